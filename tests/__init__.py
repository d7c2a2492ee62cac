"""The tests.

numpy starts a thread for each core as soon as it is imported, and threads that wait for each other by spinning take ten
times as long where other tests run beside them: matrix products here are small, and take one thread.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
