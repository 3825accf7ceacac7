-- KEYS: the bans. Returns those in force, each followed by its milliseconds left.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local found = {}
local bans = redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf', 'WITHSCORES')
for at = 1, #bans, 2 do
  table.insert(found, bans[at])
  table.insert(found, math.floor((tonumber(bans[at + 1]) - now) * 1000))
end
return found
