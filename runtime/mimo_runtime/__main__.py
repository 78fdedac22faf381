"""python -m mimo_runtime VERB: the same as the console script `mimo-runtime`."""

from mimo_runtime.cli import main

raise SystemExit(main())
