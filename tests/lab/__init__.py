"""A cluster of several hosts on one Linux machine: see ``lab.lab``."""
