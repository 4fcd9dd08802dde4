"""The programs: training in stages (main.py) and everything behind `python -m ldm`."""
