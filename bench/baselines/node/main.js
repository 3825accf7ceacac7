// The Node baseline: ws and kafkajs, which has no linger of its own: records are sent together every 5 ms.
const fs = require('node:fs');
const http = require('node:http');
const path = require('node:path');
const jwt = require('jsonwebtoken');
const protobuf = require('protobufjs');
const { CompressionCodecs, CompressionTypes, Kafka, logLevel } = require('kafkajs');
const { WebSocketServer } = require('ws');

CompressionCodecs[CompressionTypes.LZ4] = new (require('kafkajs-lz4'))().codec;

const schemas = path.join(process.env.BASELINE_PROTOS, 'gateway', 'v1');
const load = (name) => protobuf.parse(fs.readFileSync(path.join(schemas, name), 'utf8')).root;
const Envelope = load('envelope.proto').lookupType('gateway.v1.MessageEnvelope');
const UserToken = load('token.proto').lookupType('gateway.v1.UserToken');
const TOPICS = {
  tick_data: 'tick-data',
  user_event: 'user-events',
  trading_signal: 'trading-signals',
  notification: 'notifications',
};

let received = 0;
let delivered = 0;
let waiting = new Map();
let sending = false;

async function main() {
  const kafka = new Kafka({ brokers: process.env.BASELINE_KAFKA.split(','), logLevel: logLevel.NOTHING });
  const producer = kafka.producer({ idempotent: true, maxInFlightRequests: 1 });
  await producer.connect();

  async function send() {
    if (sending || waiting.size === 0) return;
    sending = true;
    const batch = waiting;
    waiting = new Map();
    let count = 0;
    const topicMessages = [];
    for (const [topic, messages] of batch) {
      topicMessages.push({ topic, messages });
      count += messages.length;
    }
    await producer.sendBatch({ topicMessages, acks: -1, compression: CompressionTypes.LZ4 });
    delivered += count;
    sending = false;
  }

  function authenticate(request) {
    const token = (request.headers.authorization || '').replace(/^Bearer /, '');
    const claims = jwt.verify(token, process.env.BASELINE_SECRET, { algorithms: ['HS256'], issuer: 'api-gateway' });
    const user = UserToken.decode(Buffer.from(claims.data, 'base64url'));
    if (user.userId !== claims.sub) throw new Error('user_id is not sub');
    return user;
  }

  const server = http.createServer();
  const sockets = new WebSocketServer({ noServer: true, perMessageDeflate: false, maxPayload: 65536 });
  server.on('upgrade', (request, socket, head) => {
    let user;
    try {
      user = authenticate(request);
    } catch {
      socket.end('HTTP/1.1 401 Unauthorized\r\nConnection: close\r\n\r\n');
      return;
    }
    sockets.handleUpgrade(request, socket, head, (connection) => {
      connection.on('error', () => {});
      connection.on('message', (message, isBinary) => {
        const envelope = Envelope.decode(message);
        const topic = TOPICS[envelope.messageType];
        if (!isBinary || !topic || envelope.userId !== user.userId || envelope.companyId !== user.companyId) {
          connection.close(1008);
          return;
        }
        received += 1;
        let messages = waiting.get(topic);
        if (messages === undefined) waiting.set(topic, (messages = []));
        messages.push({ key: user.userId, value: message });
      });
    });
  });
  const timer = setInterval(send, 5);
  server.listen({ port: Number(process.env.BASELINE_PORT), host: '127.0.0.1', backlog: 4096 }, () => {
    console.log('ready');
  });
  process.on('SIGTERM', async () => {
    clearInterval(timer);
    while (sending || waiting.size) {
      await send();
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    console.log(JSON.stringify({ received, delivered }));
    process.exit(0);
  });
}

main();
