"""What surrounds the formulas: command lines, processes, files, and a training run's steps.

Threads of OpenMP sleep while they wait. They would spin, which on a busy machine takes the core from the thread that
they wait for: a step of a second can then take a minute. Torch reads this when it is loaded.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
