module gateway/baseline

go 1.24

require (
	github.com/coder/websocket v1.8.14
	github.com/golang-jwt/jwt/v5 v5.3.0
	github.com/twmb/franz-go v1.20.0
	google.golang.org/protobuf v1.36.9
)
