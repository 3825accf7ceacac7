-- The places of one company. All keys have the company in their hash tag, so they are in one slot of a cluster.
--   places  connection -> [gateway, user, account]
--   counts  c: connections, U: users, A: accounts, u:USER: its connections, n:USER: its accounts,
--           o:USER\0ACCOUNT: its connections, oldest first, g:GATEWAY: its connections here,
--           x:GATEWAY: its lease ran out and its places were taken, e: the epoch of all of this
--   leases  gateway -> when its lease ends, milliseconds of the server's clock
local places, counts, leases = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function add(field, change)
  local n = redis.call('HINCRBY', counts, field, change)
  if n <= 0 then redis.call('HDEL', counts, field) end
  return n
end

local function count(field)
  return tonumber(redis.call('HGET', counts, field) or 0)
end

local function connections_of(user, account)
  local found = redis.call('HGET', counts, 'o:' .. user .. '\0' .. account)
  return found and cjson.decode(found) or {}
end

local function keep_connections(user, account, list)
  local field = 'o:' .. user .. '\0' .. account
  if #list == 0 then
    redis.call('HDEL', counts, field)
  else
    redis.call('HSET', counts, field, cjson.encode(list))
  end
end

local function put(connection, gateway, user, account)
  if redis.call('HEXISTS', places, connection) == 1 then return end
  redis.call('HSET', places, connection, cjson.encode({gateway, user, account}))
  add('c', 1)
  add('g:' .. gateway, 1)
  if add('u:' .. user, 1) == 1 then add('U', 1) end
  local list = connections_of(user, account)
  table.insert(list, connection)
  keep_connections(user, account, list)
  if #list == 1 then
    add('A', 1)
    add('n:' .. user, 1)
  end
end

-- The place that was taken away: [gateway, user, account]; nil when there was none.
local function take(connection)
  local found = redis.call('HGET', places, connection)
  if not found then return nil end
  local place = cjson.decode(found)
  local gateway, user, account = place[1], place[2], place[3]
  redis.call('HDEL', places, connection)
  add('c', -1)
  add('g:' .. gateway, -1)
  if add('u:' .. user, -1) <= 0 then add('U', -1) end
  local left = {}
  for _, other in ipairs(connections_of(user, account)) do
    if other ~= connection then table.insert(left, other) end
  end
  keep_connections(user, account, left)
  if #left == 0 then
    add('A', -1)
    add('n:' .. user, -1)
  end
  return place
end

local function of_gateway(gateway)
  local found = {}
  local all = redis.call('HGETALL', places)
  for at = 1, #all, 2 do
    if cjson.decode(all[at + 1])[1] == gateway then table.insert(found, all[at]) end
  end
  return found
end

-- What gateways that were killed have left behind.
local function expire()
  for _, gateway in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now)) do
    for _, connection in ipairs(of_gateway(gateway)) do take(connection) end
    redis.call('ZREM', leases, gateway)
    redis.call('HSET', counts, 'x:' .. gateway, 1)
  end
end

local function lease(gateway, lease_ms, epoch)
  redis.call('HSETNX', counts, 'e', epoch)
  redis.call('ZADD', leases, now + lease_ms, gateway)
end

-- What nobody renews is forgotten; called last, when the keys are there.
local function expire_later(lease_ms)
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, 10 * lease_ms) end
end

local function publish(event)
  redis.call('PUBLISH', 'gateway:events', cjson.encode(event))
end

-- Gateways that share the user, or the company, have to know how many connections there are.
local function tell_totals(company, user)
  if redis.call('ZCARD', leases) > 1 then
    publish({'totals', company, user, count('u:' .. user), count('c')})
  end
end
