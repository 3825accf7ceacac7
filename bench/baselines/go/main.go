// The Go baseline: coder/websocket and franz-go, a goroutine a connection.
package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"github.com/golang-jwt/jwt/v5"
	"github.com/twmb/franz-go/pkg/kgo"
	"google.golang.org/protobuf/encoding/protowire"
)

var topics = map[string]string{
	"tick_data":      "tick-data",
	"user_event":     "user-events",
	"trading_signal": "trading-signals",
	"notification":   "notifications",
}

var errProtobuf = errors.New("not a protobuf message")

// strings123 reads the string fields 1 to 3 of a message; the last value of a field wins.
func strings123(message []byte) (fields [4]string, err error) {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return fields, errProtobuf
		}
		message = message[n:]
		if number <= 3 && kind == protowire.BytesType {
			value, n := protowire.ConsumeBytes(message)
			if n < 0 {
				return fields, errProtobuf
			}
			fields[number] = string(value)
			message = message[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(number, kind, message); n < 0 {
			return fields, errProtobuf
		}
		message = message[n:]
	}
	return fields, nil
}

type server struct {
	secret              []byte
	kafka               *kgo.Client
	received, delivered atomic.Int64
}

func (s *server) authenticate(r *http.Request) (user, company string, err error) {
	raw := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	claims := jwt.MapClaims{}
	_, err = jwt.ParseWithClaims(raw, claims, func(*jwt.Token) (any, error) { return s.secret, nil },
		jwt.WithValidMethods([]string{"HS256"}), jwt.WithIssuer("api-gateway"), jwt.WithExpirationRequired())
	if err != nil {
		return "", "", err
	}
	data, _ := claims["data"].(string)
	token, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(data, "="))
	if err != nil {
		return "", "", err
	}
	fields, err := strings123(token)
	if err == nil && fields[1] != claims["sub"] {
		err = errors.New("user_id is not sub")
	}
	return fields[1], fields[2], err
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, company, err := s.authenticate(r)
	if err != nil {
		http.Error(w, "unauthorized", http.StatusUnauthorized)
		return
	}
	connection, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer connection.CloseNow()
	connection.SetReadLimit(65536)
	key := []byte(user)
	ctx := context.Background()
	report := func(_ *kgo.Record, err error) {
		if err == nil {
			s.delivered.Add(1)
		}
	}
	for {
		kind, message, err := connection.Read(ctx)
		if err != nil {
			return
		}
		fields, err := strings123(message)
		topic := topics[fields[1]]
		if err != nil || kind != websocket.MessageBinary || fields[2] != user || fields[3] != company || topic == "" {
			connection.Close(websocket.StatusPolicyViolation, "refused")
			return
		}
		s.received.Add(1)
		s.kafka.Produce(ctx, &kgo.Record{Topic: topic, Key: key, Value: message}, report)
	}
}

func main() {
	kafka, err := kgo.NewClient(
		kgo.SeedBrokers(strings.Split(os.Getenv("BASELINE_KAFKA"), ",")...),
		kgo.ProducerLinger(5*time.Millisecond),
		kgo.ProducerBatchCompression(kgo.Lz4Compression()),
		kgo.MaxBufferedRecords(2_000_000),
	)
	if err != nil {
		panic(err)
	}
	s := &server{secret: []byte(os.Getenv("BASELINE_SECRET")), kafka: kafka}
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Getenv("BASELINE_PORT"))
	if err != nil {
		panic(err)
	}
	go http.Serve(listener, s)
	fmt.Println("ready")
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	kafka.Flush(ctx)
	fmt.Printf("{\"received\": %d, \"delivered\": %d}\n", s.received.Load(), s.delivered.Load())
}
