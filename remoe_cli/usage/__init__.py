"""What served requests tell: their cost, the times of calls, and how far routing has drifted.

    cost       receipts added up by day, user or function, with idle hours and storage      remoe cost
    refit      the times of calls, fitted to what served requests told                      remoe calibrate
    drift      the divergence between served routing and the profile's                      remoe drift
    served     the plan's workload with the routing of served requests
    again      the deployed placement beside the best plan, for other times or routing

All of it reads what runtime/kept.py keeps.
"""
