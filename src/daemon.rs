//! The daemon: owns the engine of one store, listens on one socket, serves forks until it is told to stop or has been idle for
//! long. One thread per connection; nothing here touches a path inside a fork.
//!
//! A stop goes: no new forks, then the socket's name away, then the engine shut down, then the process. A client that was between
//! two of these sees a closed connection and starts a daemon of its own.

mod access;
mod calls;
mod documents;
mod log;
mod socket;

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::engine::{self, Engine, EngineError};
use crate::protocol::{
    Answer, Bytes, Code, Connection, Failure, FrameError, Hello, MAX_REQUEST, PROTOCOL, Request,
    Status, Stop, VERSION,
};
use crate::sys;
use crate::sys::process::{self, Signals};
use access::Who;
use socket::Listening;

pub use crate::engine::{EngineConfig, Keep, PASSING, Policy, TrustPolicy};
pub use socket::make_store_folder;

/// A client says who it is within this time, or is sent away.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may think between two requests.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may leave an answer unread.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How many clients are served at once.
const MAX_CLIENTS: usize = 256;
/// How many detached mounts one client may leave to the daemon.
const MAX_HELD: usize = 128;
/// How often the daemon looks whether it is still wanted.
const LOOK: Duration = Duration::from_secs(2);
/// How long a daemon waits for the one before it to let go of the store.
const HANDOVER: Duration = Duration::from_secs(5);
/// How long clients may take to end when the daemon stops.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a daemon is started with.
pub struct Options {
    pub store: PathBuf,
    pub socket: PathBuf,
    /// The socket's name stays when the daemon ends: who comes meanwhile is told so, and starts no daemon of its own.
    pub keep_name: bool,
    /// Members of this group may use the socket; without one, the store's owner alone.
    pub group: Option<u32>,
    /// End after this long without a fork or a client.
    pub idle: Option<Duration>,
    /// Started by a command: logs to a file in the store.
    pub embedded: bool,
    pub engine: EngineConfig,
    /// Told `ready`, or why not, in one line.
    pub announce: Option<File>,
}

/// What all connections share.
struct Shared {
    engine: Arc<Engine>,
    options: Facts,
    started: Instant,
    clients: AtomicUsize,
    last_used: Mutex<Instant>,
    /// No new forks are taken.
    closing: AtomicBool,
    /// The engine has been shut down.
    stopped: AtomicBool,
    /// Wakes the thread that accepts.
    wake: PipeWriter,
}

/// The part of the options that answers need.
struct Facts {
    store: PathBuf,
    socket: PathBuf,
    shared_socket: bool,
    embedded: bool,
    uid: u32,
}

/// Runs a daemon until it is stopped.
///
/// # Errors
/// Why it could not start; the same was announced.
pub fn run(mut options: Options) -> Result<(), Failure> {
    let announce = options.announce.take();
    let outcome = start(&mut options);
    if let Some(mut to) = announce {
        let line = match &outcome {
            Ok(_) => "ready\n".to_owned(),
            Err(failure) => format!("{}\n", json!(failure)),
        };
        // Whoever waited for it may be gone; the daemon is of use to others all the same.
        if let Err(error) = to.write_all(line.as_bytes()) {
            ::log::debug!("nobody waits for this daemon: {error}");
        }
    }
    let (shared, signals, listening, woken) = outcome?;
    ::log::info!(
        "forkvol {VERSION} serves {} on {}",
        options.store.display(),
        options.socket.display()
    );
    tell_service_manager(sd_notify::NotifyState::Ready);
    let ended = accept(&shared, &signals, &listening, woken, options.idle);
    drop(listening);
    shared.wait_for_clients();
    crate::mount::end_pushing();
    ended
}

/// Tells systemd how far this daemon is, where it was started by it.
fn tell_service_manager(state: sd_notify::NotifyState) {
    if let Err(error) = sd_notify::notify(&[state]) {
        ::log::warn!("cannot tell the service manager: {error}");
    }
}

type Started = (Arc<Shared>, Signals, Listening, PipeReader);

fn start(options: &mut Options) -> Result<Started, Failure> {
    let failed =
        |what: &str, error: io::Error| Failure::new(Code::Failed, format!("{what}: {error}"));
    // Before any thread: they inherit the mask.
    let signals = Signals::block(&[process::SIGTERM, process::SIGINT, process::SIGHUP])
        .map_err(|e| failed("cannot block signals", e))?;
    process::large_buffers_from_kernel();
    process::set_umask(0o077);
    socket::make_store_folder(&options.store)?;
    // Before the log: nothing is put into a folder that is no store.
    Engine::recognise(&options.store).map_err(failure)?;
    log::start(options.embedded.then(|| options.store.join("log")))?;
    if let Err(error) = sys::raise_open_files() {
        ::log::warn!("cannot raise the limit of open files: {error}");
    }
    let engine = open_engine(options)?;
    let listening = Listening::bind(&options.socket, options.group)?.keep_name(options.keep_name);
    let (woken, wake) = io::pipe().map_err(|e| failed("cannot make a pipe", e))?;
    let facts = Facts {
        store: options.store.clone(),
        socket: options.socket.clone(),
        shared_socket: options.group.is_some(),
        embedded: options.embedded,
        uid: process::euid(),
    };
    let shared = Arc::new(Shared {
        engine,
        options: facts,
        started: Instant::now(),
        clients: AtomicUsize::new(0),
        last_used: Mutex::new(Instant::now()),
        closing: AtomicBool::new(false),
        stopped: AtomicBool::new(false),
        wake,
    });
    Ok((shared, signals, listening, woken))
}

/// Opens the engine; where another process holds the store, waits a little, for it may be a daemon that is just ending.
fn open_engine(options: &Options) -> Result<Arc<Engine>, Failure> {
    let deadline = Instant::now() + HANDOVER;
    loop {
        match Engine::open(&options.store, options.engine.clone()) {
            Ok(engine) => return Ok(engine),
            Err(e) if e.code == engine::Code::Busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(failure(e)),
        }
    }
}

/// Takes connections until the daemon is to end.
fn accept(
    shared: &Arc<Shared>,
    signals: &Signals,
    listening: &Listening,
    woken: PipeReader,
    idle: Option<Duration>,
) -> Result<(), Failure> {
    let fds = [signals.as_fd(), listening.as_fd(), woken.as_fd()];
    let broken = |e: io::Error| Failure::new(Code::Failed, format!("cannot wait for clients: {e}"));
    loop {
        let ready = process::wait_readable(&fds, Some(LOOK)).map_err(broken)?;
        if shared.stopped.load(Ordering::Acquire) {
            return Ok(());
        }
        if ready.contains(&0)
            && let Some(signal) = signals.next(None).map_err(broken)?
            && signal.number != process::SIGHUP
        {
            ::log::info!("stopped by signal {}", signal.number);
            return shared.shut_down(true);
        }
        if ready.contains(&1) {
            match listening.accept() {
                Ok(Some(stream)) => {
                    shared.engine.rouse();
                    shared.admit(stream);
                }
                Ok(None) => {}
                Err(error) => {
                    // Out of descriptors, most likely: the queue is still there when some have been closed.
                    ::log::error!("cannot accept a client: {error}");
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
        if ready.is_empty() && shared.is_unwanted(idle, listening) {
            return shared.shut_down(false);
        }
    }
}

impl Shared {
    /// Starts a thread for a new client, or sends it away.
    fn admit(self: &Arc<Shared>, stream: UnixStream) {
        let before = self.clients.fetch_add(1, Ordering::AcqRel);
        let shared = Arc::clone(self);
        let client = Client { shared };
        if before >= MAX_CLIENTS {
            ::log::warn!("a client was sent away: {MAX_CLIENTS} are being served");
            return;
        }
        let spawned = std::thread::Builder::new()
            .name("client".into())
            .spawn(move || client.serve(stream));
        if let Err(error) = spawned {
            ::log::error!("cannot start a thread for a client: {error}");
        }
    }

    /// Whether nobody needs this daemon any more: idle for long, or out of reach because its socket's name is gone.
    fn is_unwanted(&self, idle: Option<Duration>, listening: &Listening) -> bool {
        if self.clients.load(Ordering::Acquire) > 0 || self.engine.live_forks() > 0 {
            *self.last_used.lock() = Instant::now();
            return false;
        }
        if self.options.embedded && !listening.is_reachable() {
            ::log::info!("the socket is gone, and so is this daemon");
            return true;
        }
        idle.is_some_and(|idle| self.last_used.lock().elapsed() >= idle)
    }

    /// Ends the engine. With `force`, live forks lose their sessions.
    fn shut_down(&self, force: bool) -> Result<(), Failure> {
        self.closing.store(true, Ordering::Release);
        tell_service_manager(sd_notify::NotifyState::Stopping);
        let result = self.engine.shutdown(force).map_err(failure);
        if let Err(failure) = &result {
            ::log::error!("cannot shut down cleanly: {failure}");
        }
        result
    }

    fn wait_for_clients(&self) {
        let deadline = Instant::now() + LAST_WORDS;
        while self.clients.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn status(&self) -> Status {
        use std::os::unix::ffi::OsStrExt;
        let bytes = |path: &PathBuf| Bytes(path.as_os_str().as_bytes().to_vec());
        Status {
            pid: std::process::id(),
            protocol: PROTOCOL,
            version: VERSION.into(),
            store: bytes(&self.options.store),
            socket: bytes(&self.options.socket),
            uptime: self.started.elapsed().as_secs(),
            forks: self.engine.live_forks() as u64,
            embedded: self.options.embedded,
        }
    }

    /// Answers `stop`: refused while forks are live, unless told to wait for them or to end them.
    fn stop(&self, stop: &Stop) -> Result<Value, Failure> {
        self.closing.store(true, Ordering::Release);
        let wait = stop.drain.map_or(Duration::ZERO, |s| {
            Duration::try_from_secs_f64(s).unwrap_or(Duration::MAX)
        });
        let begun = Instant::now();
        while self.engine.live_forks() > 0 && begun.elapsed() < wait {
            std::thread::sleep(Duration::from_millis(20));
        }
        if self.engine.live_forks() > 0 && !stop.force {
            self.closing.store(false, Ordering::Release);
            let live = calls::live_fork_names(&self.engine).join(", ");
            let (message, hint) = match stop.drain {
                None => (
                    format!("the daemon serves live forks: {live}"),
                    "commit or abandon them, or stop with --drain or --force",
                ),
                Some(seconds) => (
                    format!(
                        "forks are live still after {seconds} s, and the daemon goes on: {live}"
                    ),
                    "commit or abandon them, wait longer with --drain=DURATION, or stop with --force",
                ),
            };
            return Err(Failure::new(Code::Busy, message).hint(hint));
        }
        let ended = self.shut_down(stop.force);
        // A fork may have been mounted meanwhile: the engine goes on then, and else is of no use any more.
        let goes_on = matches!(&ended, Err(failure) if failure.code == Code::Busy);
        match goes_on {
            true => self.closing.store(false, Ordering::Release),
            false => self.stopped.store(true, Ordering::Release),
        }
        ended?;
        Ok(json!({"stopped": std::process::id()}))
    }
}

/// One connection; counted for as long as it lives.
struct Client {
    shared: Arc<Shared>,
}

impl Drop for Client {
    fn drop(&mut self) {
        *self.shared.last_used.lock() = Instant::now();
        self.shared.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Client {
    fn serve(self, stream: UnixStream) {
        let who = match Who::of(&stream, self.shared.options.uid) {
            Ok(who) => who,
            Err(error) => return ::log::error!("cannot tell who a client is: {error}"),
        };
        let mut connection = Connection::new(stream);
        match self.converse(&mut connection, &who) {
            Ok(()) | Err(FrameError::Closed) => {}
            Err(error) => {
                ::log::warn!("client {} of user {}: {error}", who.peer.pid, who.peer.uid);
            }
        }
    }

    fn converse(&self, connection: &mut Connection, who: &Who) -> Result<(), FrameError> {
        connection.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        if let Err(failure) = who.admit(self.shared.options.shared_socket) {
            return connection.send(&Answer::Error(failure));
        }
        let hello: Request = match connection.receive(MAX_REQUEST, Some(HELLO_TIMEOUT)) {
            Ok(request) => request,
            Err(error) => return Self::complain(connection, error),
        };
        let Request::Hello(hello) = hello else {
            let failure = Failure::new(Code::Usage, "the first request must be hello");
            return connection.send(&Answer::Error(failure));
        };
        connection.send(&Answer::Hello(Hello::ours()))?;
        // Dropped when the client has gone, so that it never waits for it.
        let mut held: Vec<OwnedFd> = Vec::new();
        loop {
            let request: Request = match connection.receive(MAX_REQUEST, Some(REQUEST_TIMEOUT)) {
                Ok(request) => request,
                Err(error) => return Self::complain(connection, error),
            };
            let fds = connection.take_fds();
            let result = match &request {
                Request::Hello(_) => Err(Failure::new(Code::Usage, "hello was said already")),
                Request::Status => Ok(json!(self.shared.status())),
                Request::Stop(stop) => match who.administer() {
                    Ok(()) => self.shared.stop(stop),
                    Err(failure) => Err(failure),
                },
                _ if hello.protocol != PROTOCOL => Err(Failure::new(
                    Code::Unreachable,
                    format!(
                        "the daemon is forkvol {VERSION} and speaks protocol {PROTOCOL}, not {}",
                        hello.protocol
                    ),
                )),
                Request::Detached if held.len() + fds.len() > MAX_HELD => Err(Failure::new(
                    Code::Usage,
                    "too many mounts on one connection",
                )),
                Request::Detached => {
                    held.extend(fds);
                    Ok(json!({}))
                }
                _ => calls::answer(&self.shared, who, connection, request, fds)?,
            };
            let sent = connection.send(&result.map_or_else(Answer::Error, Answer::Done));
            // Whether or not anybody is left to hear the answer.
            if self.shared.stopped.load(Ordering::Acquire) {
                if let Err(error) = (&self.shared.wake).write_all(b"x") {
                    ::log::error!("cannot wake the daemon to end it: {error}");
                }
                return sent;
            }
            sent?;
        }
    }

    /// Tells a client what was wrong with its message, where it can still be told, and gives it up.
    fn complain(connection: &mut Connection, error: FrameError) -> Result<(), FrameError> {
        if matches!(
            error,
            FrameError::Garbage(_) | FrameError::TooLong { .. } | FrameError::TooManyFds(_)
        ) {
            connection.send(&Answer::Error(Failure::new(Code::Usage, error.to_string())))?;
        }
        Err(error)
    }
}

/// Turns an answer of the engine into one of the protocol.
fn failure(error: EngineError) -> Failure {
    let code = match error.code {
        engine::Code::Failed => Code::Failed,
        engine::Code::Usage => Code::Usage,
        engine::Code::NotFound => Code::NotFound,
        engine::Code::HeadMoved => Code::HeadMoved,
        engine::Code::Damaged => Code::Damaged,
        engine::Code::Policy => Code::Policy,
        engine::Code::Busy => Code::Busy,
        engine::Code::NoSpace => Code::NoSpace,
    };
    Failure {
        of_store: false,
        code,
        message: error.message,
        hint: error.hint,
    }
}
