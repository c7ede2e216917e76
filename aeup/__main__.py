from aeup.cli import main

main(prog_name="python -m aeup")
