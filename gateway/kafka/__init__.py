"""librdkafka on Trio, translated once; knows no WebSocket.

`properties` says what librdkafka is told, `producer` queues records and reads their reports, `faults` whose fault a
failure is, `topics` what the cluster and its topics are like, `partitioner` where a key belongs. `embedded` is a Kafka
inside the process, for trials.
"""
