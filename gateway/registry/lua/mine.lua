-- ARGV: gateway. Returns its connections.
return of_gateway(ARGV[1])
