"""Deploy a plan: from `remoe deploy PLAN` to a deployment that answers, stage by stage.

1. The target. `cli/target.pick` returns a `Target` (target.py): `local/target.LocalTarget` or `aws/target.AwsTarget`.

2. The inputs. `inputs.read_inputs` reads the plan with its profile and catalog, and verifies it (plan/verify/check.py).

3. The files. `package/bundle.build` writes the expert functions' code and one shard of experts for each. `main_files.write_main_files`
   writes what the main function needs: its weights (package/partial_checkpoint.py), server.json, plan.json.

4. Locally, `local/lifecycle.start` starts a detached supervisor, which serves Lambda's Invoke API and keeps the main server running.

5. On AWS, `aws/template.templates` makes CloudFormation templates, `aws/quotas.check` and `aws/money.bill` say what AWS refuses and what it
   costs. `aws/deployment.apply` uploads files (aws/storage.py), shows the changes, asks, and executes them (aws/stack.py).

All stages talk to the user through one `Console` (console.py).
"""
