"""The command line `hf-lowrank`: a command is in the module named like the sub-package that does its work."""
