"""Make the files of a deployment: expert functions, main function and its container image."""
