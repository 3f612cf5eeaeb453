"""`python -m resnet_fused`, the same as the command `resnet-fused`."""

from resnet_fused.cli import main

if __name__ == "__main__":
    main()
