"""`python -m dpo_kernels.verify`: the same as the command `dpo verify`."""

import sys

from dpo_kernels.verify import main

if __name__ == "__main__":
    sys.exit(main())
