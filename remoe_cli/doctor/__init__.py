"""What `remoe doctor` looks at: this machine, an AWS account, a model, a plan, a deployment.

Each module looks at one of them and returns findings. Nothing is changed, started or paid for.
"""
