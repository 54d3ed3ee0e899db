"""`python -m treelora_ray`: the command line."""

from treelora_ray.cli import main

main()
