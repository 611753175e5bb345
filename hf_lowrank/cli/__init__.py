"""The command line `hf-lowrank`."""
