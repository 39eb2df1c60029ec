"""For launchers that start modules: ``accelerate launch -m thinkkv.sdk.cli train ...``."""

from thinkkv.sdk.cli import main

main()
