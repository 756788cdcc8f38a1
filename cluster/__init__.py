"""Machines and jobs: the local head, job submission, and the demo that runs everything as jobs."""
