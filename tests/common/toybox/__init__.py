"""A user's own package: what test_build.py and test_config.py name in their configs."""
