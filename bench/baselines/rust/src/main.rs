//! The Rust baseline: tokio-tungstenite and rdkafka, a task a connection on one thread.
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use futures_util::StreamExt;
use jsonwebtoken::{decode, Algorithm, DecodingKey, Validation};
use prost::Message as _;
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{ClientConfig, ClientContext};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::Message;

#[derive(prost::Message)]
struct Envelope {
    #[prost(string, tag = "1")]
    message_type: String,
    #[prost(string, tag = "2")]
    user_id: String,
    #[prost(string, tag = "3")]
    company_id: String,
}

#[derive(prost::Message)]
struct UserToken {
    #[prost(string, tag = "1")]
    user_id: String,
    #[prost(string, tag = "2")]
    company_id: String,
}

#[derive(serde::Deserialize)]
struct Claims {
    sub: String,
    data: String,
}

struct Counts {
    received: AtomicU64,
    delivered: AtomicU64,
}

struct Reports(Arc<Counts>);

impl ClientContext for Reports {}

impl ProducerContext for Reports {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, _: ()) {
        if result.is_ok() {
            self.0.delivered.fetch_add(1, Relaxed);
        }
    }
}

struct Server {
    key: DecodingKey,
    validation: Validation,
    producer: ThreadedProducer<Reports>,
    counts: Arc<Counts>,
}

impl Server {
    fn authenticate(&self, request: &Request) -> Option<UserToken> {
        let header = request.headers().get("authorization")?.to_str().ok()?;
        let token = header.strip_prefix("Bearer ")?;
        let claims = decode::<Claims>(token, &self.key, &self.validation).ok()?.claims;
        let data = claims.data.trim_end_matches('=');
        let data = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(data).ok()?;
        let user = UserToken::decode(&data[..]).ok()?;
        (user.user_id == claims.sub).then_some(user)
    }

    fn topic(message_type: &str) -> Option<&'static str> {
        match message_type {
            "tick_data" => Some("tick-data"),
            "user_event" => Some("user-events"),
            "trading_signal" => Some("trading-signals"),
            "notification" => Some("notifications"),
            _ => None,
        }
    }

    async fn serve(self: Arc<Self>, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let mut user = None;
        let admit = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
            user = self.authenticate(request);
            match user {
                Some(_) => Ok(response),
                None => {
                    let mut refusal = ErrorResponse::new(None);
                    *refusal.status_mut() = 401.try_into().unwrap();
                    Err(refusal)
                }
            }
        };
        let config = WebSocketConfig::default().read_buffer_size(4096).max_message_size(Some(65536));
        let Ok(mut socket) = tokio_tungstenite::accept_hdr_async_with_config(stream, admit, Some(config)).await else {
            return;
        };
        let user = user.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            let Message::Binary(message) = message else { continue };
            let Ok(envelope) = Envelope::decode(message.clone()) else { return };
            if envelope.user_id != user.user_id || envelope.company_id != user.company_id {
                return;
            }
            let Some(topic) = Self::topic(&envelope.message_type) else { return };
            self.counts.received.fetch_add(1, Relaxed);
            let mut record = BaseRecord::to(topic).key(user.user_id.as_bytes()).payload(&message[..]);
            while let Err((_, again)) = self.producer.send(record) {
                record = again;
                tokio::task::yield_now().await;
            }
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let counts = Arc::new(Counts { received: AtomicU64::new(0), delivered: AtomicU64::new(0) });
    let producer: ThreadedProducer<Reports> = ClientConfig::new()
        .set("bootstrap.servers", std::env::var("BASELINE_KAFKA").unwrap())
        .set("enable.idempotence", "true")
        .set("partitioner", "murmur2_random")
        .set("compression.type", "lz4")
        .set("linger.ms", "5")
        .set("batch.num.messages", "10000")
        .set("queue.buffering.max.messages", "2000000")
        .create_with_context(Reports(counts.clone()))
        .unwrap();
    let mut validation = Validation::new(Algorithm::HS256);
    validation.set_issuer(&["api-gateway"]);
    validation.validate_aud = false;
    let secret = std::env::var("BASELINE_SECRET").unwrap();
    let server =
        Arc::new(Server { key: DecodingKey::from_secret(secret.as_bytes()), validation, producer, counts });
    let listener = TcpListener::bind(format!("127.0.0.1:{}", std::env::var("BASELINE_PORT").unwrap())).await.unwrap();
    println!("ready");
    let mut stop = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    tokio::spawn(server.clone().serve(stream));
                }
            }
            _ = stop.recv() => break,
        }
    }
    let _ = server.producer.flush(Duration::from_secs(30));
    println!(
        "{{\"received\": {}, \"delivered\": {}}}",
        server.counts.received.load(Relaxed),
        server.counts.delivered.load(Relaxed)
    );
}
