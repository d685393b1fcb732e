"""The engines that are compared, one worker each; every module runs in the environment of its own engine."""
