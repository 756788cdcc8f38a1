"""The spine that every command shares: configs, run folders, reports, metrics and Ray sessions."""
