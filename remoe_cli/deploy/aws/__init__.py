"""The target AWS: one bucket and one CloudFormation stack for each deployment; nothing is kept on this machine."""
