"""What a deployment would do under a trace of requests: waiting, cold starts, refusals and money.

`remoe plan` works with means and closed forms. Here every request of a trace arrives at its time, finds instances busy, idle or gone, and
waits or starts them. requests.py makes the requests, service.py says what one way of serving takes and costs, run.py lets the requests
arrive, summary.py adds up.
"""
