//! A connection to the daemon of a store: found, believed, or started.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::output::{self, warn};
use super::place::{Place, SERVICE_SOCKET};
use crate::daemon::make_store_folder;
use crate::protocol::{
    Answer, Code, Connection, Failure, FrameError, Hello, Incoming, MAX_ANSWER, Outgoing, PROTOCOL,
    Request, Status, Stop, VERSION,
};
use crate::sys::{FsKind, process, socket};

/// A daemon says hello within this time; it has a thread for it.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to look for a daemon that somebody else is just starting.
const PATIENCE: Duration = Duration::from_secs(15);

/// Variables that the daemon keeps of its caller's. All others, a job's secrets among them, stay behind, and so do those by which
/// CI agents find the processes to kill at a job's end.
const KEPT_VARIABLES: [&str; 12] = [
    "HOME",
    "PATH",
    "LANG",
    "TZ",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "XDG_DATA_HOME",
    "XDG_CONFIG_HOME",
    "DBUS_SESSION_BUS_ADDRESS",
    "FORKVOL_LOG",
    "RUST_BACKTRACE",
    "LD_LIBRARY_PATH",
];

/// A daemon that has said hello.
pub struct Client {
    connection: Connection,
    socket: PathBuf,
    place: Place,
    hello: Hello,
}

impl Client {
    /// Connects to the daemon of `place`, and starts one where there is none.
    pub fn connect_or_start(place: &Place) -> Result<Client, Failure> {
        match Client::connect(place)? {
            Some(client) => client.of_this_version(place),
            None => start(place),
        }
    }

    /// Connects to the daemon of `place` if there is one.
    pub fn connect(place: &Place) -> Result<Option<Client>, Failure> {
        for path in place.sockets() {
            if let Some(client) = Client::at(&path, place)? {
                return Ok(Some(client));
            }
        }
        Ok(None)
    }

    fn at(path: &Path, place: &Place) -> Result<Option<Client>, Failure> {
        let stream = match socket::connect(path) {
            Ok(stream) => stream,
            Err(e) => return unreachable(path, place, &e),
        };
        believe(path, &socket::peer(&stream), place)?;
        let mut connection = Connection::new(stream);
        let greeted = connection
            .send(&Request::Hello(Hello::ours()))
            .and_then(|()| connection.receive(MAX_ANSWER, Some(HELLO_TIMEOUT)));
        match greeted {
            Ok(Answer::Hello(hello)) => Ok(Some(Client {
                connection,
                socket: path.into(),
                place: place.clone(),
                hello,
            })),
            Ok(Answer::Error(failure)) => Err(failure),
            Ok(_) | Err(FrameError::Garbage(_) | FrameError::TooLong { .. }) => Err(Failure::new(
                Code::Unreachable,
                format!("what listens on {} is no forkvol daemon", path.display()),
            )
            .hint("remove that socket, or name another store with --store")),
            // It was ending when we came.
            Err(FrameError::Closed) if *place != Place::Service => Ok(None),
            Err(error) => Err(lost(path, &error)),
        }
    }

    /// A second connection to the same daemon, if it can be had.
    pub fn beside(&self) -> Option<Client> {
        Client::at(&self.socket, &self.place).ok().flatten()
    }

    /// Asks for something.
    pub fn call(&mut self, request: &Request) -> Result<Value, Failure> {
        self.call_with_fd(request, None)
    }

    /// Asks for something, with a descriptor beside the question.
    pub fn call_with_fd(
        &mut self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, Failure> {
        let sent = self.connection.send_with_fd(request, fd);
        sent.map_err(|e| lost(&self.socket, &e))?;
        self.answer()
    }

    /// Asks for content and writes it to `out`, which errors call by the path that it has.
    pub fn fetch(
        &mut self,
        request: &Request,
        out: &mut dyn io::Write,
        path: Option<&Path>,
    ) -> Result<Value, Failure> {
        self.connection
            .send(request)
            .map_err(|e| lost(&self.socket, &e))?;
        match self.receive()? {
            Answer::Content => {}
            other => return self.last(other),
        }
        io::copy(&mut Incoming::new(&mut self.connection), out).map_err(|e| {
            let what = match path {
                Some(path) => format!("cannot write {}", path.display()),
                None => "cannot copy the content".into(),
            };
            Failure::new(Code::Failed, format!("{what}: {}", output::reason(&e)))
        })?;
        self.answer()
    }

    /// Asks for something that is made of content, and sends that.
    pub fn send(
        &mut self,
        request: &Request,
        content: &mut dyn io::Read,
    ) -> Result<Value, Failure> {
        self.connection
            .send(request)
            .map_err(|e| lost(&self.socket, &e))?;
        match self.receive()? {
            Answer::Send => {}
            other => return self.last(other),
        }
        let mut out = Outgoing::new(&mut self.connection);
        io::copy(content, &mut out).map_err(|e| {
            Failure::new(
                Code::Failed,
                format!("cannot send the content: {}", output::reason(&e)),
            )
        })?;
        out.finish().map_err(|e| lost(&self.socket, &e))?;
        self.answer()
    }

    /// What the daemon says of itself.
    pub fn status(&mut self) -> Result<Status, Failure> {
        let value = self.call(&Request::Status)?;
        serde_json::from_value(value).map_err(|e| lost(&self.socket, &FrameError::Garbage(e)))
    }

    /// Ends the daemon; returns when its process has gone.
    pub fn stop(mut self, stop: Stop) -> Result<(), Failure> {
        let pid = self.status()?.pid;
        self.call(&Request::Stop(stop))?;
        // The connection closes before the store is let go; the process ends right after.
        let deadline = Instant::now() + PATIENCE;
        while process::exists(pid) && !is_zombie(pid) {
            if Instant::now() > deadline {
                let message = format!("the daemon (pid {pid}) has stopped but does not end");
                return Err(Failure::new(Code::Failed, message));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Replaces an embedded daemon of another version if nothing depends on it.
    fn of_this_version(mut self, place: &Place) -> Result<Client, Failure> {
        if self.hello == Hello::ours() {
            return Ok(self);
        }
        let status = self.status()?;
        if status.embedded && status.forks == 0 {
            self.stop(Stop::default())?;
            return start(place);
        }
        if self.hello.protocol == PROTOCOL {
            return Ok(self);
        }
        let message = format!(
            "the daemon (pid {}) is forkvol {} with {} live forks and does not understand forkvol {VERSION}",
            status.pid, status.version, status.forks
        );
        Err(Failure::new(Code::Unreachable, message)
            .hint("end its forks and run forkvol daemon stop, or use that version"))
    }

    fn receive(&mut self) -> Result<Answer, Failure> {
        self.connection
            .receive(MAX_ANSWER, None)
            .map_err(|e| lost(&self.socket, &e))
    }

    fn answer(&mut self) -> Result<Value, Failure> {
        let answer = self.receive()?;
        self.last(answer)
    }

    fn last(&self, answer: Answer) -> Result<Value, Failure> {
        match answer {
            Answer::Done(value) => Ok(value),
            Answer::Error(failure) => Err(Failure {
                of_store: true,
                ..failure
            }),
            Answer::Hello(_) | Answer::Content | Answer::Send => {
                let message = format!(
                    "the daemon on {} answered out of turn",
                    self.socket.display()
                );
                Err(Failure::new(Code::Unreachable, message))
            }
        }
    }
}

fn is_zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('Z'))
    })
}

fn lost(path: &Path, error: &FrameError) -> Failure {
    let message = format!("the daemon on {} was lost: {error}", path.display());
    Failure::new(Code::Unreachable, message).hint("see forkvol doctor")
}

/// Nobody there: for the service that is an error, for a store of one's own a daemon can be started.
fn unreachable(path: &Path, place: &Place, error: &io::Error) -> Result<Option<Client>, Failure> {
    let failure = |message: String| Failure::new(Code::Unreachable, message);
    match (place, error.kind()) {
        // A store that is no folder is refused by name when a daemon is to be started.
        (
            Place::Embedded { .. },
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::NotADirectory,
        ) => Ok(None),
        (Place::Service, io::ErrorKind::PermissionDenied) => {
            let group = fs::metadata(SERVICE_SOCKET).map_or(0, |m| m.gid());
            let group = process::group_name(group).unwrap_or_else(|| group.to_string());
            Err(failure(format!(
                "the service's socket {SERVICE_SOCKET} is not open to you"
            ))
            .hint(format!(
                "join the group {group}, or name a store of your own with --store"
            )))
        }
        (Place::Service, _) => Err(failure(format!(
            "the service does not listen on {SERVICE_SOCKET}: {error}"
        ))
        .hint("start it, or remove that socket")),
        (Place::Embedded { .. }, io::ErrorKind::PermissionDenied) => Err(failure(format!(
            "the socket {} is not open to you",
            path.display()
        ))
        .hint("the store belongs to somebody else; name one of your own with --store")),
        (Place::Embedded { .. }, _) => Err(failure(format!(
            "cannot connect to {}: {error}",
            path.display()
        ))),
    }
}

/// A daemon is believed only where nobody else could have put it: it runs as root, the caller or the store's owner, and its
/// socket lies in a folder of such a user that no other may write to.
fn believe(path: &Path, peer: &io::Result<socket::Peer>, place: &Place) -> Result<(), Failure> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let failure = |why: String| {
        let message = format!("the socket {} is not to be trusted: {why}", path.display());
        Failure::new(Code::Policy, message)
    };
    let doubt =
        |why: String| Err(failure(why).hint("remove it, or name another store with --store"));
    let metadata = match fs::metadata(folder) {
        Ok(metadata) => metadata,
        Err(e) => return doubt(format!("its folder cannot be looked at: {e}")),
    };
    let mut trusted = vec![0, process::euid()];
    match place {
        // Only root can have made a folder under /run.
        Place::Service => trusted.push(metadata.uid()),
        Place::Embedded { store, .. } => {
            trusted.extend(fs::metadata(store).map(|m| m.uid()));
        }
    }
    if !trusted.contains(&metadata.uid()) {
        return doubt(format!("its folder belongs to user {}", metadata.uid()));
    }
    if metadata.mode() & 0o022 != 0 {
        let folder = folder.display();
        return Err(
            failure(format!("others may write to {folder}")).hint(format!("chmod go-w {folder}"))
        );
    }
    match peer {
        Ok(peer) if trusted.contains(&peer.uid) => Ok(()),
        Ok(peer) => doubt(format!("user {} listens there", peer.uid)),
        Err(e) => doubt(format!("who listens there is not known: {e}")),
    }
}

/// Starts a daemon, once however many commands find none at the same time.
fn start(place: &Place) -> Result<Client, Failure> {
    let (Place::Embedded { store, .. }, Some(socket)) = (place, place.sockets().into_iter().next())
    else {
        return Err(
            Failure::new(Code::Unreachable, format!("no daemon serves {place}"))
                .hint("start the service"),
        );
    };
    match make_store_folder(store)? {
        FsKind::Overlay => {
            warn(&format!(
                "the store {} lies on an overlay and goes with its container",
                store.display()
            ));
        }
        FsKind::Tmpfs => {
            warn(&format!(
                "the store {} lies in memory and does not survive a reboot",
                store.display()
            ));
        }
        FsKind::Nfs | FsKind::Smb | FsKind::Fuse | FsKind::Other => {}
    }
    let folder = File::open(store).map_err(|error| {
        Failure::new(
            Code::Failed,
            format!("cannot open the store {}: {error}", store.display()),
        )
    })?;
    // Whoever waited here finds the daemon that the one before has started. Where the filesystem has no locks, the store's own
    // lock still lets one daemon win.
    folder.lock().ok();
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(client) = Client::connect(place)? {
            return client.of_this_version_or_fail();
        }
        match spawn(store, &socket) {
            Ok(()) => {}
            // Somebody started one by hand, or without our lock.
            Err(failure) if failure.code == Code::Busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(failure) => return Err(failure),
        }
    }
}

impl Client {
    fn of_this_version_or_fail(self) -> Result<Client, Failure> {
        if self.hello.protocol == PROTOCOL {
            return Ok(self);
        }
        let message = format!("a daemon of forkvol {} took the store", self.hello.version);
        Err(Failure::new(Code::Unreachable, message))
    }
}

/// Runs the daemon and waits until it is ready, or has said why not.
fn spawn(store: &Path, socket: &Path) -> Result<(), Failure> {
    // It must not go with the caller's cgroup, as a job's does at its end.
    if Path::new("/run/systemd/system").exists()
        && let Some(outcome) = spawn_by(scope(), store, socket)
    {
        return outcome;
    }
    spawn_by(None, store, socket).unwrap_or_else(|| {
        Err(
            Failure::new(Code::Unreachable, "the daemon ended before it was ready")
                .hint(format!("see {}", store.join("log").display())),
        )
    })?;
    if ends_with_its_cgroup() {
        warn(&format!(
            "the daemon of {} ends with this container or job, and its live forks with it; see forkvol doctor",
            store.display()
        ));
    }
    Ok(())
}

/// Whether a process that this one starts ends with a container, or with the cgroup of a job or login.
pub fn ends_with_its_cgroup() -> bool {
    let in_container =
        Path::new("/.dockerenv").exists() || Path::new("/run/.containerenv").exists();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let is_root = |line: &str| line.ends_with(":/") || line.ends_with("/init.scope");
    in_container || !own.lines().all(is_root)
}

/// The command that gives the daemon a cgroup of its own.
fn scope() -> Option<Command> {
    let mut command = Command::new("systemd-run");
    if process::euid() != 0 {
        command.arg("--user");
    }
    command.args(["--scope", "--quiet", "--collect", "--"]);
    Some(command)
}

/// Returns `None` if the program before ours did not come to run it.
fn spawn_by(wrapper: Option<Command>, store: &Path, socket: &Path) -> Option<Result<(), Failure>> {
    let wrapped = wrapper.is_some();
    let program = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let mut command = match wrapper {
        Some(mut command) => {
            command.arg(program);
            command
        }
        None => Command::new(program),
    };
    command.arg("--store").arg(store);
    command
        .args(["daemon", "run", "--embedded", "--socket"])
        .arg(socket);
    command.env_clear();
    command.envs(
        KEPT_VARIABLES
            .iter()
            .filter_map(|k| Some((k, std::env::var_os(k)?))),
    );
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = match process::with_clean_mask(&mut command).spawn() {
        Ok(child) => child,
        Err(_) if wrapped => return None,
        Err(e) => {
            return Some(Err(Failure::new(
                Code::Failed,
                format!("cannot start a daemon: {e}"),
            )));
        }
    };
    let mut line = String::new();
    let read = child
        .stdout
        .take()
        .map(|out| BufReader::new(out).read_line(&mut line));
    match (read, line.trim()) {
        (Some(Ok(_)), "ready") => Some(Ok(())),
        (_, "") => {
            // It has ended without a word; reap it.
            child.wait().ok()?;
            None
        }
        (_, text) => Some(Err(serde_json::from_str(text).unwrap_or_else(|_| {
            Failure::new(Code::Failed, format!("the daemon said {text:?}"))
        }))),
    }
}
