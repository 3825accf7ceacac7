-- ARGV: gateway, lease_ms, epoch. Returns the epoch, whether the gateway's places were taken, and how many it has.
local gateway = ARGV[1]
expire()
lease(gateway, tonumber(ARGV[2]), ARGV[3])
expire_later(tonumber(ARGV[2]))
return {redis.call('HGET', counts, 'e'), redis.call('HEXISTS', counts, 'x:' .. gateway), count('g:' .. gateway)}
