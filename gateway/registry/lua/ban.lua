-- KEYS: the bans, a sorted set of JSON by when they end. ARGV: seconds left, the ban, its event, how many are kept.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[1]), ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -tonumber(ARGV[4]) - 1)
redis.call('PUBLISH', 'gateway:events', ARGV[3])
return 1
