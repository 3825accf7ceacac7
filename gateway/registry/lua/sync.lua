-- ARGV: gateway, lease_ms, epoch, company, then connection, user and account of each of its places. Whatever the limits
-- are: they are open.
local gateway = ARGV[1]
expire()
for _, connection in ipairs(of_gateway(gateway)) do take(connection) end
lease(gateway, tonumber(ARGV[2]), ARGV[3])
redis.call('HDEL', counts, 'x:' .. gateway)
local users = {}
for at = 5, #ARGV, 3 do
  put(ARGV[at], gateway, ARGV[at + 1], ARGV[at + 2])
  users[ARGV[at + 1]] = true
end
expire_later(tonumber(ARGV[2]))
for user in pairs(users) do tell_totals(ARGV[4], user) end
return redis.call('HGET', counts, 'e')
