"""The way up: from a WebSocket message to a Kafka record that is confirmed, or to the place where it is kept.

`endpoint` lets a connection in, `session` judges its messages and hands them over, `sessions` are all of them, `talk`
is what clients are told. `lanes` hold what is under way. `delivery` does what the table of `fates` says with each of
the `messages` that are not plain: `waitlist` and `parking` hold what waits, `deadletters` words what Kafka refuses,
`spool` keeps what it does not take.
"""
