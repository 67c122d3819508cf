"""The target AWS: each deployment is one bucket and one CloudFormation stack; no state is kept here."""
