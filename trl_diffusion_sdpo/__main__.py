"""`python -m trl_diffusion_sdpo`: the command `trl-diffusion-sdpo`, by the Python that runs."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
