"""Start Python with USR1 and USR2 held back: `python shield.py ARGUMENTS...` becomes `python ARGUMENTS...`.

A job may be preempted while it still loads its libraries, when either signal would kill it. Held back, it is
delivered once `slurm.job.StopRequest` is ready for it.
"""

import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
