"""The commands of `trl-diffusion-sdpo`, one module per command."""

EXIT_OK = 0
EXIT_USER_ERROR = 2  # as in argparse
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells
