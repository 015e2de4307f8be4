//! What listens on a socket, or does not: dead ones, strangers, other versions, other users.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use forkvol::protocol::{Answer, Bytes, Connection, Hello, PROTOCOL, Request, Status};

use super::*;

impl Cli {
    fn listen(&self) -> UnixListener {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(self.path("store"))
            .unwrap();
        UnixListener::bind(self.path("store/forkvol.sock")).unwrap()
    }
}

const SOON: Option<Duration> = Some(Duration::from_secs(10));

#[test]
fn a_dead_socket_gives_way_and_a_file_in_its_place_does_not() {
    let cli = Cli::new();
    drop(cli.listen());
    assert!(cli.path("store/forkvol.sock").exists());
    cli.ok(&["volumes"]);
    cli.ok(&["daemon", "stop"]);
    fs::write(cli.path("store/forkvol.sock"), "precious").unwrap();
    let (code, line) = cli.fails(&["volumes"]);
    assert!(
        code == 1 && line.contains("no socket is in the way; remove"),
        "{line}"
    );
    assert_eq!(
        fs::read(cli.path("store/forkvol.sock")).unwrap(),
        b"precious"
    );
    fs::remove_file(cli.path("store/forkvol.sock")).unwrap();
}

#[test]
fn a_stranger_on_the_socket_is_named_and_not_waited_for() {
    for words in [
        &b"HTTP/1.1 400 Bad Request\r\n"[..],
        &[0, 0, 0, 4, b'n', b'o', b'p', b'e'],
    ] {
        let cli = Cli::new();
        let listener = cli.listen();
        let stranger = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(words).unwrap();
            let ended = stream.read_to_end(&mut Vec::new());
            // Whoever goes without having read all resets the connection.
            assert!(ended.map_or_else(|e| e.kind() == ErrorKind::ConnectionReset, |_| true));
        });
        let (code, line) = cli.fails(&["volumes"]);
        stranger.join().unwrap();
        assert!(
            code == 12 && line.contains("is no forkvol daemon; remove"),
            "{line}"
        );
        fs::remove_file(cli.path("store/forkvol.sock")).unwrap();
    }
}

#[test]
fn garbage_and_other_protocols_are_answered_and_the_daemon_serves_on() {
    let cli = Cli::new();
    let pid = cli.daemon_pid_started();
    let connect = || UnixStream::connect(cli.path("store/forkvol.sock")).unwrap();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 0, 0, 1, b'x'],
        &[0xff; 64],
        b"",
    ] {
        let mut stream = connect();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.set_read_timeout(SOON).unwrap();
        let mut answer = Vec::new();
        // What was sent behind the garbage resets the connection.
        if stream.read_to_end(&mut answer).is_ok() && !garbage.is_empty() {
            assert!(
                String::from_utf8_lossy(&answer).contains("\"usage\""),
                "{answer:?}"
            );
        }
    }
    let mut other = Connection::new(connect());
    let hello = Hello {
        protocol: PROTOCOL + 1,
        version: "99.0.0".into(),
    };
    other.send(&Request::Hello(hello)).unwrap();
    assert!(matches!(
        other.receive(1 << 20, SOON).unwrap(),
        Answer::Hello(_)
    ));
    other.send(&Request::Volumes).unwrap();
    let Answer::Error(failure) = other.receive(1 << 20, SOON).unwrap() else {
        panic!("a request of another protocol was answered");
    };
    assert!(failure.message.contains("speaks protocol"), "{failure}");
    other.send(&Request::Status).unwrap();
    assert!(matches!(
        other.receive(1 << 20, SOON).unwrap(),
        Answer::Done(_)
    ));
    drop(other);
    assert_eq!(cli.daemon_pid(), pid);
}

impl Cli {
    fn daemon_pid_started(&self) -> u32 {
        self.ok(&["daemon", "start"]);
        self.daemon_pid()
    }

    /// A daemon of another version, of which a process is the life: it ends when the client has stopped it, or gone.
    fn other_version(&self, protocol: u32, forks: u64) -> thread::JoinHandle<bool> {
        let listener = self.listen();
        let socket = self.path("store/forkvol.sock");
        let mut process = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = process.id();
        thread::spawn(move || {
            let stopped = serve_as(&listener, pid, protocol, forks);
            fs::remove_file(&socket).unwrap();
            process.kill().unwrap();
            process.wait().unwrap();
            stopped
        })
    }
}

/// Serves one client as another version would; returns whether it was told to stop.
fn serve_as(listener: &UnixListener, pid: u32, protocol: u32, forks: u64) -> bool {
    let version = || "0.0.1".to_owned();
    let (stream, _) = listener.accept().unwrap();
    let mut client = Connection::new(stream);
    while let Ok(request) = client.receive::<Request>(1 << 20, SOON) {
        let answer = match request {
            Request::Hello(_) => Answer::Hello(Hello {
                protocol,
                version: version(),
            }),
            Request::Status => Answer::Done(serde_json::json!(Status {
                pid,
                protocol,
                version: version(),
                store: Bytes::default(),
                socket: Bytes::default(),
                uptime: 1,
                forks,
                embedded: true,
            })),
            Request::Stop(_) => {
                let answer = Answer::Done(serde_json::json!({"stopped": true}));
                client.send(&answer).unwrap();
                return true;
            }
            Request::Volumes => Answer::Done(serde_json::json!({"volumes": []})),
            other => panic!("{other:?}"),
        };
        client.send(&answer).unwrap();
    }
    false
}

#[test]
fn a_daemon_of_another_version_is_replaced_unless_forks_live_on_it() {
    let idle = Cli::new();
    let other = idle.other_version(PROTOCOL, 0);
    idle.ok(&["volumes"]);
    assert!(other.join().unwrap(), "it was told to stop");
    assert_eq!(
        idle.json(&["daemon", "status"])["version"],
        env!("CARGO_PKG_VERSION")
    );

    let busy = Cli::new();
    let other = busy.other_version(PROTOCOL, 1);
    busy.ok(&["volumes"]);
    assert!(!other.join().unwrap(), "its forks go on");

    let strange = Cli::new();
    let other = strange.other_version(PROTOCOL + 1, 1);
    let (code, line) = strange.fails(&["volumes"]);
    assert!(!other.join().unwrap());
    assert!(
        code == 12 && line.contains("0.0.1") && line.contains("end its forks"),
        "{line}"
    );
}

#[test]
fn an_embedded_daemon_ends_when_it_is_idle() {
    let cli = Cli::new();
    fs::create_dir_all(cli.path("config/forkvol")).unwrap();
    fs::write(cli.path("config/forkvol/config.toml"), "idle = \"1s\"\n").unwrap();
    let pid = cli.daemon_pid_started();
    let begun = Instant::now();
    let runs =
        || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"));
    while runs() {
        assert!(begun.elapsed() < Duration::from_secs(10), "it does not end");
        thread::sleep(Duration::from_millis(20));
    }
    assert!(begun.elapsed() >= Duration::from_millis(900));
    assert!(!cli.path("store/forkvol.sock").exists());
    let (code, line) = cli.fails(&["daemon", "status"]);
    assert!(
        code == 12 && line.contains("forkvol daemon start starts one"),
        "{line}"
    );
}

#[test]
fn a_daemon_that_was_told_to_stop_ends_though_who_told_it_has_gone() {
    let cli = Cli::new();
    let fork = cli.ok(&["fork", "v", "m"]);
    let pid = cli.daemon_pid();
    let mut stop = cli
        .command(&["daemon", "stop", "--drain=60s"])
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let refused = loop {
        let output = cli.call(&["fork", "w", "n"]);
        if !output.status.success() {
            break String::from_utf8(output.stderr).unwrap();
        }
        cli.ok(&["abandon", "./n"]);
        assert!(begun.elapsed() < Duration::from_secs(10), "it drains");
    };
    assert!(refused.contains("; try again when"), "{refused}");
    stop.kill().unwrap();
    stop.wait().unwrap();
    cli.ok(&["abandon", &fork]);
    while cli.call(&["daemon", "status"]).status.success() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it has ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    cli.ok(&["fork", "w", "n"]);
    assert_ne!(cli.daemon_pid(), pid);
}

#[test]
fn who_is_not_in_the_services_group_is_told_so_and_gets_no_store_of_his_own() {
    let lines = super::environment::surrounded(
        r#"mount -t tmpfs -o mode=755 none /run
        mkdir /run/forkvol
        bare() { user env -u FORKVOL_STORE "$@"; }
        env -u FORKVOL_STORE FORKVOL_STORE="$WORK/service" forkvol daemon run --socket /run/forkvol/forkvol.sock --group daemon 2> daemon.err &
        daemon=$!
        for n in $(seq 500); do [ -S /run/forkvol/forkvol.sock ] && break; sleep 0.02; done
        for command in volumes "fork v m" "daemon status"; do says bare forkvol $command; done
        ls -A home
        kill $daemon
        wait $daemon || echo "it failed"
        says bare forkvol volumes
        ls -A home"#,
    );
    super::environment::expect(
        &lines,
        &[
            (
                "12",
                &["/run/forkvol/forkvol.sock", "join the group daemon"],
            ),
            (
                "12",
                &["/run/forkvol/forkvol.sock", "join the group daemon"],
            ),
            (
                "12",
                &["/run/forkvol/forkvol.sock", "join the group daemon"],
            ),
            ("12", &["/run/forkvol/forkvol.sock"]),
        ],
    );
}

#[test]
fn a_folder_that_others_may_write_to_is_no_place_for_a_socket() {
    let cli = Cli::new();
    let pid = cli.daemon_pid_started();
    fs::set_permissions(cli.path("store"), fs::Permissions::from_mode(0o777)).unwrap();
    let (code, line) = cli.fails(&["volumes"]);
    assert!(
        code == 14 && line.contains("others may write") && line.contains("chmod go-w"),
        "{line}"
    );
    fs::set_permissions(cli.path("store"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(cli.daemon_pid(), pid);
}
