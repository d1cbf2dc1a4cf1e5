"""torchrun without its own traceback: the process that failed has said what is wrong.

python scripts/torchrun.py --nproc_per_node=4 scripts/train_voc.py run_name=my_run    (run_train.sh)
"""

import os
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    os.environ["TAG2MASK_LAUNCHER"] = str(os.getpid())  # a training stops when this process is killed
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"process {rank} was ended by signal {-failure.exitcode}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except DistNetworkError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        if "EADDRINUSE" in str(error):
            print("the port is taken, perhaps by another run: give another PORT", file=sys.stderr)
        else:
            print("the first node cannot be reached: see MASTER_ADDR, PORT and firewalls", file=sys.stderr)
        sys.exit(2)
    except SignalException as error:  # Ctrl-C, or a cluster's end of the time; the processes got it too
        sys.exit(128 + error.sigval)
