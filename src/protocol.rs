//! What the command line and the daemon say to each other over a Unix socket.
//!
//! A frame is a big-endian u32 length and that many bytes of JSON, or of raw content where the frame before has announced it. The
//! first request of a connection is [`Request::Hello`]. `hello`, `status` and `stop` never change shape, so that any two versions
//! can tell each other apart and part in peace; all else belongs to one [`PROTOCOL`] number.

mod content;
mod frame;

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

pub use crate::engine::{Owner, When};
pub use content::{Incoming, Outgoing};
pub use frame::{Connection, FrameError};

/// The number of this protocol. A daemon answers `hello`, `status` and `stop` to every other number too, and nothing else.
pub const PROTOCOL: u32 = 1;
/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The longest request a daemon reads.
pub const MAX_REQUEST: usize = 1 << 20;
/// The longest answer a client reads. A list of a million paths fits.
pub const MAX_ANSWER: usize = 256 << 20;
/// The longest frame of raw content.
pub const MAX_CONTENT: usize = 1 << 20;

/// A byte string: in JSON a string where it is valid UTF-8, else `{"b64":"…"}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum BytesForm<'a> {
    Text(std::borrow::Cow<'a, str>),
    Raw { b64: String },
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match str::from_utf8(&self.0) {
            Ok(text) => BytesForm::Text(text.into()),
            Err(_) => BytesForm::Raw {
                b64: BASE64.encode(&self.0),
            },
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match BytesForm::deserialize(deserializer)? {
            BytesForm::Text(text) => Ok(Bytes(text.into_owned().into_bytes())),
            BytesForm::Raw { b64 } => BASE64.decode(b64).map(Bytes).map_err(D::Error::custom),
        }
    }
}

/// What a client may ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    Hello(Hello),
    Status,
    Stop(Stop),
    /// Makes a fork; it is not mounted yet.
    Fork(Box<Fork>),
    /// Serves a fork on the FUSE device that comes beside this frame.
    Serve(Serve),
    /// What is judged of a job of which this is said.
    Trust {
        facts: Option<Facts>,
    },
    /// What is known of one fork.
    Find {
        fork: String,
    },
    Commit(Commit),
    /// Drops forks; answers with the mounts that the client is to take away.
    Abandon {
        forks: Vec<String>,
    },
    /// The forks that nothing uses any more.
    Orphans,
    /// The client has taken a mount away. The descriptor beside this holds what the kernel remembers of it, which takes long to
    /// drop: the daemon does so when the client has closed its own copy and the connection.
    Detached,
    Forks,
    Volumes,
    Volume {
        name: String,
    },
    RemoveVolume {
        name: String,
        force: bool,
    },
    RenameVolume {
        old: String,
        new: String,
    },
    ResetVolume {
        name: String,
    },
    Log {
        volume: String,
    },
    Rollback {
        volume: String,
        version: String,
    },
    Pin {
        version: String,
        pinned: bool,
    },
    Diff {
        a: String,
        b: String,
    },
    List {
        version: String,
        path: Bytes,
    },
    /// The content of a file, as frames after the answer [`Answer::Content`].
    Cat {
        version: String,
        path: Bytes,
    },
    /// A version as a tar file, in frames likewise.
    Export {
        version: String,
    },
    /// Makes a version of a tar file, which the client sends in frames after the answer [`Answer::Send`].
    Import {
        volume: String,
    },
    Stats,
    Gc {
        dry_run: bool,
        /// Then everything is compressed once more.
        #[serde(default)]
        settle: bool,
    },
    Check,
    Repair {
        remove: bool,
    },
}

/// The first words of both sides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u32,
    pub version: String,
}

impl Hello {
    /// Returns what this program says of itself.
    pub fn ours() -> Hello {
        Hello {
            protocol: PROTOCOL,
            version: VERSION.into(),
        }
    }
}

/// What a daemon says of itself. Never changes shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub pid: u32,
    pub protocol: u32,
    pub version: String,
    pub store: Bytes,
    pub socket: Bytes,
    /// Seconds since it was started.
    pub uptime: u64,
    /// How many forks are live.
    pub forks: u64,
    /// Started by a command, to end when idle.
    pub embedded: bool,
}

/// How to stop. Never changes shape.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stop {
    /// End the sessions of live forks.
    pub force: bool,
    /// Take no new forks and wait this many seconds for the live ones to end.
    pub drain: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fork {
    pub volume: String,
    pub from: Option<String>,
    pub parents: Vec<String>,
    pub read_only: bool,
    pub ephemeral: bool,
    pub size: u64,
    pub labels: BTreeMap<String, String>,
    pub excludes: Vec<String>,
    pub default_excludes: bool,
    pub owner: Owner,
    pub acl: bool,
    pub suid: bool,
    pub dev: bool,
    pub job: Option<String>,
    /// How the client's user ids differ from the machine's.
    #[serde(default)]
    pub uid_map: Option<String>,
    #[serde(default)]
    pub facts: Option<Facts>,
}

/// What an agent says of its job; nothing of it is believed from anybody else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// It was made for a change from outside, such as a pull request of a repository's fork.
    pub foreign: Option<bool>,
    /// Its branch or tag is protected.
    pub protected: Option<bool>,
    /// What its volumes are called by where it is not trusted, such as `pr-12`.
    pub scope: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serve {
    pub fork: String,
    /// The folder of the fork that is to be at the top, made where it is missing; empty for all of it.
    pub folder: Bytes,
    pub mountpoint: Bytes,
    /// The device number of the mount, as stat(2) gives it.
    pub device: u64,
    /// The mountpoint was made for this fork and goes with it.
    pub created: bool,
    /// The mount namespace in which it is, by its inode number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<u64>,
    /// What serves the same by now has been taken away and lives on where nobody sees it: it is to end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub instead: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// The forks, all of which are committed or none, and when each of them makes a version.
    pub forks: BTreeMap<String, When>,
    pub keep: bool,
    pub labels: BTreeMap<String, String>,
    pub message: Option<String>,
    pub if_head: Option<String>,
    pub if_base: bool,
    pub force: bool,
}

impl Commit {
    /// A commit of these forks with nothing else asked for; they end with it.
    pub fn of(forks: impl IntoIterator<Item = (String, When)>) -> Commit {
        Commit {
            forks: forks.into_iter().collect(),
            keep: false,
            labels: BTreeMap::new(),
            message: None,
            if_head: None,
            if_base: false,
            force: false,
        }
    }
}

/// What a daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Hello(Hello),
    Done(Value),
    /// Frames of raw content follow, then one without bytes, then the last answer.
    Content,
    /// The client is to send frames of raw content, then one without bytes; then comes the last answer.
    Send,
    Error(Failure),
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: Code,
    pub message: String,
    pub hint: Option<String>,
    /// Whether the daemon of a store says so.
    #[serde(skip)]
    pub of_store: bool,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure {
            code,
            message: message.into(),
            hint: None,
            of_store: false,
        }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }
}

/// The kinds of failure: one per exit status of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    Failed,
    Usage,
    NotFound,
    HeadMoved,
    Unreachable,
    Damaged,
    Policy,
    Busy,
    NoSpace,
    Interrupted,
    /// A code of a newer program.
    #[serde(other)]
    Unknown,
}

/// Where a fork is mounted, in answers: what a client compares before it unmounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub path: Bytes,
    /// The folder of the fork that is there; empty for all of it.
    #[serde(default)]
    pub folder: Bytes,
    pub device: u64,
    #[serde(default)]
    pub created: bool,
    /// Who mounted it, which a command of somebody else's goes by: what a user says of a folder holds for his own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The mount namespace in which it was mounted, by its inode number, while it is served.
    #[serde(default)]
    pub namespace: Option<u64>,
    /// The fork; None if an older version wrote this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fork: Option<String>,
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::option::of;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::hostile;

    #[test]
    fn bytes_are_text_where_they_can_be() {
        for (bytes, form) in [
            (&b"a/b"[..], json!("a/b")),
            (b"", json!("")),
            ("ä\n".as_bytes(), json!("ä\n")),
            (b"\xff\x00", json!({"b64": "/wA="})),
        ] {
            let value = Bytes(bytes.to_vec());
            assert_eq!(serde_json::to_value(&value).unwrap(), form);
            assert_eq!(serde_json::from_value::<Bytes>(form).unwrap(), value);
        }
        assert!(serde_json::from_value::<Bytes>(json!({"b64": "*"})).is_err());
    }

    #[test]
    fn the_stable_requests_keep_their_shape() {
        for (request, form) in [
            (
                Request::Hello(Hello {
                    protocol: 1,
                    version: "0.1.0".into(),
                }),
                json!({"hello": {"protocol": 1, "version": "0.1.0"}}),
            ),
            (Request::Status, json!("status")),
            (
                Request::Stop(Stop {
                    force: false,
                    drain: Some(1.5),
                }),
                json!({"stop": {"force": false, "drain": 1.5}}),
            ),
        ] {
            assert_eq!(serde_json::to_value(&request).unwrap(), form);
            assert_eq!(serde_json::from_value::<Request>(form).unwrap(), request);
        }
        let status = json!({"pid": 7, "protocol": 1, "version": "0.1.0", "store": "/s", "socket": "/s/forkvol.sock",
            "uptime": 3, "forks": 0, "embedded": true});
        let parsed: Status = serde_json::from_value(status.clone()).unwrap();
        assert_eq!(serde_json::to_value(parsed).unwrap(), status);
    }

    #[test]
    fn what_is_not_known_is_refused_and_not_ignored() {
        let unknown = json!({"serve": {"fork": "f-a", "folder": "", "mountpoint": "/m", "device": 1, "created": false, "more": 1}});
        assert!(serde_json::from_value::<Request>(unknown).is_err());
        let code: Code = serde_json::from_value(json!("of_the_future")).unwrap();
        assert_eq!(code, Code::Unknown);
    }

    fn requests() -> impl Strategy<Value = Request> + Clone {
        let text = || ".{0,12}";
        let bytes = || vec(any::<u8>(), 0..12).prop_map(Bytes);
        let labels = || btree_map(text(), text(), 0..3);
        let when = prop_oneof![
            Just(When::Always),
            Just(When::OnChange),
            Just(When::IfMissing)
        ];
        let forks = btree_map(text(), when, 0..3);
        let fork = (
            text(),
            of(text()),
            vec(text(), 0..3),
            labels(),
            any::<u64>(),
            of(any::<u32>()),
        );
        prop_oneof![
            (of(any::<bool>()), of(text())).prop_map(|(foreign, scope)| Request::Trust {
                facts: Some(Facts {
                    foreign,
                    protected: None,
                    scope,
                })
            }),
            fork.prop_map(|(volume, from, excludes, labels, size, gid)| {
                Request::Fork(Box::new(Fork {
                    volume,
                    job: from.clone(),
                    uid_map: from.clone(),
                    from,
                    parents: excludes.clone(),
                    read_only: size % 2 == 0,
                    ephemeral: size % 3 == 0,
                    size,
                    labels,
                    excludes,
                    default_excludes: size % 5 == 0,
                    owner: gid.map_or(Owner::Keep, |id| Owner::Ids(id, gid)),
                    acl: true,
                    suid: false,
                    dev: false,
                    facts: (size % 7 == 0).then(|| Facts {
                        foreign: Some(size % 2 == 0),
                        protected: None,
                        scope: Some("pr-1".into()),
                    }),
                }))
            }),
            (text(), bytes(), any::<u64>()).prop_map(|(fork, mountpoint, device)| {
                Request::Serve(Serve {
                    fork,
                    folder: mountpoint.clone(),
                    mountpoint,
                    device,
                    created: device % 2 == 0,
                    namespace: (device % 3 == 0).then_some(device),
                    instead: device % 5 == 0,
                })
            }),
            (forks, labels(), of(text())).prop_map(|(forks, labels, message)| {
                Request::Commit(Commit {
                    labels,
                    message,
                    ..Commit::of(forks)
                })
            }),
            (any::<bool>(), of(0.0_f64..1e9))
                .prop_map(|(force, drain)| Request::Stop(Stop { force, drain })),
            (text(), bytes()).prop_map(|(version, path)| Request::Cat { version, path }),
            (any::<bool>(), any::<bool>())
                .prop_map(|(dry_run, settle)| Request::Gc { dry_run, settle }),
        ]
    }

    fn encode(message: &impl Serialize) -> Vec<u8> {
        serde_json::to_vec(message).unwrap()
    }

    proptest! {
        #[test]
        fn requests_come_back_as_they_were(request in requests()) {
            prop_assert_eq!(serde_json::from_slice::<Request>(&encode(&request)).unwrap(), request);
        }

        #[test]
        fn hostile_requests_are_refused_or_mean_one_thing(bytes in hostile::bytes(requests().prop_map(|r| encode(&r)))) {
            if let Ok(request) = serde_json::from_slice::<Request>(&bytes) {
                prop_assert_eq!(serde_json::from_slice::<Request>(&encode(&request)).unwrap(), request);
            }
            if let Ok(answer) = serde_json::from_slice::<Answer>(&bytes) {
                prop_assert_eq!(serde_json::from_slice::<Answer>(&encode(&answer)).unwrap(), answer);
            }
        }

        #[test]
        fn any_bytes_survive(bytes: Vec<u8>) {
            let bytes = Bytes(bytes);
            prop_assert_eq!(serde_json::from_slice::<Bytes>(&encode(&bytes)).unwrap(), bytes);
        }
    }

    #[test]
    fn nesting_without_end_is_refused() {
        for open in ["[", "{\"done\":", "{\"fork\":{\"labels\":"] {
            let deep = open.repeat(MAX_REQUEST / open.len());
            assert!(serde_json::from_str::<Request>(&deep).is_err());
            assert!(serde_json::from_str::<Answer>(&deep).is_err());
            assert!(serde_json::from_str::<Bytes>(&deep).is_err());
        }
    }
}
