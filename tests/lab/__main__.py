"""Start a lab by hand, look around in it, end it.

make lab-up                               # three hosts and a laptop, until make lab-down
PYTHONPATH=tests python -m lab run laptop 'ssh system-a nvidia-cards'
PYTHONPATH=tests python -m lab cut box
"""
