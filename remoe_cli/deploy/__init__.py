"""Where a plan runs: the local twin of AWS Lambda, or AWS itself."""
