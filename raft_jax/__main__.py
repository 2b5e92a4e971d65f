import sys

from raft_jax.cli import main

sys.exit(main())
