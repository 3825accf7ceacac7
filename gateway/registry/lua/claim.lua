-- ARGV: gateway, lease_ms, epoch, company, connection, user, account, and the limits of users, accounts, accounts of a
-- user, connections of an account; 0 is none.
local gateway, lease_ms, epoch, company = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local connection, user, account = ARGV[5], ARGV[6], ARGV[7]
local users, accounts, of_user, of_account = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
expire()
local list = connections_of(user, account)
if users > 0 and count('u:' .. user) == 0 and count('U') >= users then return {'too_many_users'} end
if #list == 0 then
  if of_user > 0 and count('n:' .. user) >= of_user then return {'too_many_accounts'} end
  if accounts > 0 and count('A') >= accounts then return {'too_many_accounts'} end
end
lease(gateway, lease_ms, epoch)
local replaced = {}
while of_account > 0 and #list - #replaced + 1 > of_account do
  local oldest = list[#replaced + 1]
  local place = take(oldest)
  table.insert(replaced, oldest)
  if place and place[1] ~= gateway then publish({'revoked', company, user, oldest}) end
end
put(connection, gateway, user, account)
expire_later(lease_ms)
tell_totals(company, user)
return {'', redis.call('HGET', counts, 'e'), count('u:' .. user), count('c'), unpack(replaced)}
