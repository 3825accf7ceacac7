-- ARGV: company, connection.
local place = take(ARGV[2])
if place then tell_totals(ARGV[1], place[2]) end
return 1
