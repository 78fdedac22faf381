"""python -m mimo_qat VERB: the same as the console script `mimo-qat`."""

from mimo_qat.cli import main

raise SystemExit(main())
