"""Draw images with a trained model: the one of this folder, one in diffusers' layout, or a registered one.

    python -m tasks.draw [--label 3] [--prompt "a red flower"] [--seed 0 1 2] [--out picture.png]

`python -m tasks.draw --help` lists the options. PNG files contain the settings, which `--like FILE` reads back.
"""

from __future__ import annotations

import sys

from tasks.drawing import options


def main() -> None:
    """Run the command line."""
    given = options.parse()

    from tasks.runtime.stage import limit_openmp_spin

    limit_openmp_spin()
    from tasks.drawing.run import run
    from tasks.params import ParamsError
    from tasks.params.redaction import redacted
    from tasks.runtime.errors import StageError

    try:
        run(given)
    except (StageError, ParamsError) as error:
        sys.exit(f"draw: error: {redacted(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
