"""Entry point of `python -m share_hf.cli`."""

from . import main


raise SystemExit(main())
