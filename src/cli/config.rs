//! config.toml: what an administrator or a user sets once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::values;
use crate::daemon::{Keep, PASSING, Policy, TrustPolicy};
use crate::protocol::{Code, Failure};
use crate::sys::process;

/// Where the service's configuration lies; where there is one, a user's own is not read.
pub const SYSTEM_FILE: &str = "/etc/forkvol/config.toml";

/// What a file may say.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default, deserialize_with = "folder")]
    store: Option<PathBuf>,
    group: Option<String>,
    #[serde(default, deserialize_with = "duration")]
    idle: Option<Duration>,
    // As it was spelled before.
    #[serde(
        default,
        rename = "orphan-after",
        alias = "orphan_after",
        deserialize_with = "duration"
    )]
    orphan_after: Option<Duration>,
    #[serde(default, deserialize_with = "size")]
    cache: Option<u64>,
    #[serde(default, deserialize_with = "size")]
    reserve: Option<u64>,
    #[serde(default, deserialize_with = "room")]
    size: Option<u64>,
    threads: Option<u16>,
    wakeful: Option<bool>,
    #[serde(default, deserialize_with = "size")]
    limit: Option<u64>,
    #[serde(default, rename = "min-free", deserialize_with = "size")]
    min_free: Option<u64>,
    #[serde(default)]
    retention: Vec<Rule>,
    trust: Option<Trust>,
}

/// Which jobs are trusted, and what the others may do.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Trust {
    /// Users, by name or number, whose hooks are believed.
    agents: Vec<String>,
    /// Volumes that untrusted jobs may read.
    #[serde(default)]
    read: Vec<String>,
    #[serde(default)]
    protected_only: bool,
    #[serde(default)]
    commit: UntrustedCommit,
    #[serde(default, deserialize_with = "size")]
    limit: Option<u64>,
}

/// What the commit of an untrusted job moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum UntrustedCommit {
    #[default]
    Nothing,
    Scope,
}

impl Trust {
    fn policy(&self) -> Result<TrustPolicy, String> {
        let user = |name: &String| match name.parse() {
            Ok(uid) => Ok(uid),
            Err(_) => process::user_id(name).ok_or_else(|| format!("there is no user {name}")),
        };
        let mut policy = TrustPolicy::default();
        policy.agents = self.agents.iter().map(user).collect::<Result<_, _>>()?;
        policy.protected_only = self.protected_only;
        policy.scopes = self.commit == UntrustedCommit::Scope;
        policy.limit = self.limit.unwrap_or(policy.limit);
        policy.set_readable(&self.read)?;
        Ok(policy)
    }

    fn shown(&self, policy: &TrustPolicy) -> Value {
        json!({
            "agents": self.agents,
            "read": self.read,
            "protected-only": self.protected_only,
            "commit": if policy.scopes { "scope" } else { "nothing" },
            "limit": policy.limit,
        })
    }
}

/// How long versions of the volumes with such names stay; what it does not say is default.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Rule {
    volumes: String,
    keep_versions: Option<u32>,
    #[serde(default, deserialize_with = "duration")]
    keep_for: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    unused_for: Option<Duration>,
}

impl File {
    fn policy(&self) -> Result<Policy, String> {
        let mut policy = Policy::new(self.limit, self.min_free);
        for rule in &self.retention {
            policy.add(&rule.volumes, rule.keep())?;
        }
        Ok(policy)
    }
}

impl Rule {
    fn keep(&self) -> Keep {
        let default = Keep::default();
        Keep {
            versions: self.keep_versions.map_or(default.versions, |n| n as usize),
            younger: self.keep_for.unwrap_or(default.younger),
            unused: self.unused_for.unwrap_or(default.unused),
        }
    }
}

fn shown(volumes: &str, keep: Keep) -> Value {
    json!({
        "volumes": volumes,
        "keep-versions": keep.versions,
        "keep-for": keep.younger.as_secs_f64(),
        "unused-for": keep.unused.as_secs_f64(),
    })
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    values::duration(&text)
        .map(Some)
        .map_err(serde::de::Error::custom)
}

/// A folder that is the same one for the daemon and for every caller, wherever it stands and whoever's home it has.
fn folder<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    match path.is_absolute() {
        true => Ok(Some(path)),
        false => Err(serde::de::Error::custom(format!(
            "{path:?} is no whole path, which begins with a slash"
        ))),
    }
}

fn room<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    values::room(&text)
        .map(Some)
        .map_err(serde::de::Error::custom)
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    values::size(&text)
        .map(Some)
        .map_err(serde::de::Error::custom)
}

/// A value of [`Config::table`] as a file has it; what has no value, and no word for that, is a dash.
pub fn as_written(name: &str, value: &Value) -> String {
    const DURATIONS: [&str; 4] = ["idle", "orphan-after", "keep-for", "unused-for"];
    const SIZES: [&str; 5] = ["cache", "reserve", "size", "limit", "min-free"];
    match value {
        Value::Null => "-".into(),
        // A file that says nothing of trust.
        Value::String(off) if name == "trust" => off.clone(),
        Value::Number(number) if DURATIONS.contains(&name) => {
            let seconds = number.as_f64().unwrap_or_default();
            format!("{:?}", values::duration_text(seconds))
        }
        Value::Number(number) if SIZES.contains(&name) => {
            format!(
                "{:?}",
                values::size_text(number.as_u64().unwrap_or_default())
            )
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| as_written(name, item)).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(entries) => {
            let entry =
                |(name, value): (&String, &Value)| format!("{name} = {}", as_written(name, value));
            let entries: Vec<String> = entries.iter().map(entry).collect();
            format!("{{ {} }}", entries.join(", "))
        }
        Value::String(text) => toml::Value::from(text.as_str()).to_string(),
        other => other.to_string(),
    }
}

/// The settings in force.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file they were read from.
    pub file: Option<PathBuf>,
    said: File,
    retention: Policy,
    trust: Option<TrustPolicy>,
}

impl Config {
    /// Reads the configuration of this caller.
    pub fn load() -> Result<Config, Failure> {
        for path in [Some(PathBuf::from(SYSTEM_FILE)), user_file()]
            .into_iter()
            .flatten()
        {
            match fs::read_to_string(&path) {
                Ok(text) => return Config::parse(&text, &path),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    ) => {}
                Err(e) => {
                    let message = format!("cannot read {}: {e}", path.display());
                    return Err(Failure::new(Code::Failed, message));
                }
            }
        }
        Ok(Config {
            file: None,
            said: File::default(),
            retention: Policy::default(),
            trust: None,
        })
    }

    fn parse(text: &str, path: &Path) -> Result<Config, Failure> {
        let said: File = toml::from_str(text).map_err(|error: toml::de::Error| {
            let before = error
                .span()
                .and_then(|span| text.get(..span.start))
                .unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            let column = before.len() - before.rfind('\n').map_or(0, |at| at + 1) + 1;
            let message = format!("{}:{line}:{column}: {}", path.display(), error.message());
            Failure::new(Code::Usage, message)
        })?;
        let retention = said.policy().map_err(|why| {
            let message = format!("{}: retention: {why}", path.display());
            Failure::new(Code::Usage, message)
        })?;
        let trust = said.trust.as_ref().map(Trust::policy).transpose();
        let trust = trust.map_err(|why| {
            let message = format!("{}: trust: {why}", path.display());
            Failure::new(Code::Usage, message)
        })?;
        Ok(Config {
            file: Some(path.into()),
            said,
            retention,
            trust,
        })
    }

    /// The store of a caller who names none.
    pub fn store(&self) -> Option<&Path> {
        self.said.store.as_deref()
    }

    /// The group whose members may use the service.
    pub fn group(&self) -> Option<&str> {
        self.said.group.as_deref()
    }

    /// An embedded daemon ends after this long without a fork.
    pub fn idle(&self) -> Duration {
        self.said.idle.unwrap_or(Duration::from_secs(600))
    }

    /// A fork without mount is an orphan after this long.
    pub fn orphan_after(&self) -> Duration {
        self.said.orphan_after.unwrap_or(Duration::from_secs(3600))
    }

    /// Memory for decoded nodes and content.
    pub fn cache(&self) -> u64 {
        self.said.cache.unwrap_or(128 << 20)
    }

    /// Room on the store's disk that forks may not take; `None`: the larger of 1 GiB and 2 %.
    pub fn reserve(&self) -> Option<u64> {
        self.said.reserve
    }

    /// Room for new data in a fork.
    pub fn size(&self) -> u64 {
        self.said.size.unwrap_or(20 << 30)
    }

    /// Threads that store content at commit; `None`: one a core.
    pub fn threads(&self) -> Option<usize> {
        self.said
            .threads
            .map(usize::from)
            .filter(|threads| *threads > 0)
    }

    /// Whether a privileged daemon may keep idle cores from sleeping while its mounts are busy.
    pub fn wakeful(&self) -> bool {
        self.said.wakeful.unwrap_or(true)
    }

    /// What is removed by itself.
    pub fn retention(&self) -> &Policy {
        &self.retention
    }

    /// Which jobs are trusted; `None`: all who may use the store.
    pub fn trust(&self) -> Option<&TrustPolicy> {
        self.trust.as_ref()
    }

    /// Each setting, its value, and where that came from.
    pub fn table(&self) -> Vec<(&'static str, Value, String)> {
        let file = self
            .file
            .as_ref()
            .map_or_else(String::new, |f| f.display().to_string());
        let origin = |said: bool| {
            if said {
                file.clone()
            } else {
                "default".to_owned()
            }
        };
        let s = &self.said;
        vec![
            ("store", json!(s.store), origin(s.store.is_some())),
            ("group", json!(s.group), origin(s.group.is_some())),
            (
                "idle",
                json!(self.idle().as_secs_f64()),
                origin(s.idle.is_some()),
            ),
            (
                "orphan-after",
                json!(self.orphan_after().as_secs_f64()),
                origin(s.orphan_after.is_some()),
            ),
            ("cache", json!(self.cache()), origin(s.cache.is_some())),
            (
                "reserve",
                json!(self.reserve()),
                origin(s.reserve.is_some()),
            ),
            ("size", json!(self.size()), origin(s.size.is_some())),
            (
                "threads",
                json!(self.threads()),
                origin(s.threads.is_some()),
            ),
            (
                "wakeful",
                json!(self.wakeful()),
                origin(s.wakeful.is_some()),
            ),
            ("limit", json!(s.limit), origin(s.limit.is_some())),
            ("min-free", json!(s.min_free), origin(s.min_free.is_some())),
            (
                "retention",
                // What holds where the file says nothing of such volumes comes behind it.
                s.retention
                    .iter()
                    .map(|rule| shown(&rule.volumes, rule.keep()))
                    .chain(PASSING.map(|volumes| shown(volumes, Keep::passing())))
                    .chain([shown("**", Keep::default())])
                    .collect(),
                origin(!s.retention.is_empty()),
            ),
            (
                "trust",
                match (&s.trust, &self.trust) {
                    (Some(trust), Some(policy)) => trust.shown(policy),
                    _ => json!("off"),
                },
                origin(s.trust.is_some()),
            ),
        ]
    }
}

/// Where a user's own configuration lies.
pub fn user_file() -> Option<PathBuf> {
    let folder = match std::env::var_os("XDG_CONFIG_HOME").filter(|v| !v.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => process::home()?.join(".config"),
    };
    Some(folder.join("forkvol/config.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/c.toml")).map_err(|f| f.message)
    }

    #[test]
    fn what_a_file_says_is_in_force_and_the_rest_is_default() {
        let config = parse("idle = \"30s\"\ncache = \"1g\"\nstore = \"/s\"\n").unwrap();
        assert_eq!(config.idle(), Duration::from_secs(30));
        assert_eq!(config.cache(), 1 << 30);
        assert_eq!(config.store(), Some(Path::new("/s")));
        assert_eq!(config.size(), 20 << 30);
        let table = config.table();
        assert!(table.contains(&("cache", json!(1 << 30), "/c.toml".into())));
        assert!(
            table
                .iter()
                .any(|(name, _, origin)| *name == "size" && origin == "default")
        );
    }

    /// > `config.toml` says otherwise: the first table whose pattern matches the volume's name counts, before what is built in;
    /// > what it does not say is 10 versions, 24 hours and 14 days. `forkvol config` shows all of them.
    #[test]
    fn the_retention_of_the_manual_is_understood() {
        let text = include_str!("../../docs/semantics.md");
        let (_, text) = text.split_once("```toml\n").unwrap();
        let config = parse(text.split("```").next().unwrap()).unwrap();
        assert_eq!(config.retention().limit, Some(200 << 30));
        assert_eq!(config.retention().min_free, Some(20 << 30));
        let table = config.table();
        let (_, shown, _) = table
            .iter()
            .find(|(name, ..)| *name == "retention")
            .unwrap();
        let first = json!({"volumes": "shop/branch/**", "keep-versions": 2, "keep-for": 3600.0, "unused-for": 259_200.0});
        assert_eq!(shown[0], first);
        assert_eq!(shown[1]["keep-versions"], 10);
        let built_in = &shown.as_array().unwrap()[2..];
        let passing = json!({"volumes": "**/branch/**", "keep-versions": 2, "keep-for": 3600.0, "unused-for": 259_200.0});
        assert_eq!((built_in.len(), &built_in[0]), (3, &passing));
        let wrong = parse("[[retention]]\nvolumes = \"a{\"\n").unwrap_err();
        assert!(
            wrong.starts_with("/c.toml: retention: the pattern"),
            "{wrong}"
        );
    }

    #[test]
    fn the_trust_of_the_manual_is_understood() {
        let text = include_str!("../../docs/trust.md");
        let (_, text) = text.split_once("```toml\n").unwrap();
        let config = parse(text.split("```").next().unwrap()).unwrap();
        let policy = config.trust().unwrap();
        assert_eq!(policy.agents, [0, 998]);
        assert!(policy.scopes && policy.protected_only && policy.may_read("npm"));
        assert!(parse("").unwrap().trust().is_none());
        for (text, part) in [
            ("[trust]\n", "/c.toml:1:1: missing field `agents`"),
            (
                "[trust]\nagents = [\"nobody-of-that-name\"]",
                "/c.toml: trust: there is no user",
            ),
            (
                "[trust]\nagents = []\nread = [\"a{\"]",
                "/c.toml: trust: the pattern",
            ),
            (
                "[trust]\nagents = []\ncommit = \"all\"",
                "/c.toml:3:10: unknown variant `all`",
            ),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_mistake_is_named_with_its_place_in_one_line() {
        for (text, part) in [
            (
                "idle = \"30s\"\nchache = \"1g\"\n",
                "/c.toml:2:1: unknown field `chache`",
            ),
            ("\n  cache = \"lots\"", "/c.toml:2:"),
            ("threads = -1", "/c.toml:1:11:"),
            ("store = ", "/c.toml:1:"),
            ("store = \"\"", "/c.toml:1:9: \"\" is no whole path"),
            ("store = \"~/x\"", "/c.toml:1:9: \"~/x\" is no whole path"),
            ("store = \"x/y\"", "/c.toml:1:9: \"x/y\" is no whole path"),
            ("size = \"0\"", "/c.toml:1:8: nothing could be written"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(part), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    const ALL: &str = r#"
store = "/s"
group = "ci"
idle = "30s"
orphan-after = "1h"
cache = "1g"
reserve = "10g"
size = "20g"
threads = 3
wakeful = false
limit = "1t"
min-free = "20g"
[[retention]]
volumes = "shop/branch/**"
keep-versions = 2
keep-for = "1.5h"
unused-for = "3d"
[trust]
agents = ["root", "998"]
read = ["npm"]
commit = "scope"
protected-only = true
limit = "1g"
"#;

    proptest::proptest! {
        #[test]
        fn a_hostile_file_is_read_or_named_in_one_line(text in crate::hostile::text(proptest::prelude::Just(ALL.to_owned()))) {
            match Config::parse(&text, Path::new("/c.toml")) {
                // Whatever it says can be shown, and every time in it can be waited for.
                Ok(config) => {
                    config.table();
                    let _ = (config.idle(), config.orphan_after(), config.size(), config.retention());
                }
                Err(failure) => {
                    let line = crate::cli::exit::line(&failure);
                    assert!(line.starts_with("/c.toml:") && !line.contains(char::is_control), "{line}");
                }
            }
        }
    }

    #[test]
    fn what_is_shown_can_be_written_into_a_file() {
        for text in [
            "",
            ALL,
            "idle = \"90s\"\nreserve = \"1000\"\nstore = \"/a \\\"b\"\n",
        ] {
            let config = parse(text).unwrap();
            let line = |(name, value, _): (&str, Value, String)| match as_written(name, &value) {
                none if none == "-" || value == json!("off") => String::new(),
                written => format!("{name} = {written}\n"),
            };
            let shown: String = config.table().into_iter().map(line).collect();
            let again = parse(&shown).unwrap_or_else(|why| panic!("{shown}: {why}"));
            let values = |config: &Config| -> Vec<Value> {
                let rows = config.table().into_iter();
                rows.filter(|(name, ..)| *name != "retention")
                    .map(|(_, value, _)| value)
                    .collect()
            };
            assert_eq!(values(&again), values(&config), "{shown}");
        }
        assert_eq!(as_written("idle", &json!(600.0)), "\"10m\"");
        assert_eq!(as_written("cache", &json!(128 << 20)), "\"128m\"");
    }

    #[test]
    fn the_manual_has_every_key_and_its_default() {
        let manual = include_str!("../../docs/operations.md");
        let (_, rows) = manual.split_once("| key | default |").unwrap();
        let default = parse("").unwrap().table();
        for (name, value, _) in default
            .iter()
            .filter(|(name, ..)| !["retention", "trust"].contains(name))
        {
            let row = rows
                .lines()
                .find(|row| row.starts_with(&format!("| `{name}` |")));
            let row = row.unwrap_or_else(|| panic!("{name} is not there"));
            if !value.is_null() {
                let written = format!("| `{}` |", as_written(name, value));
                assert!(row.contains(&written), "{row}: {written}");
            }
        }
        for name in ["[[retention]]", "[trust]"] {
            assert!(rows.contains(&format!("| `{name}` |")), "{name}");
        }
    }

    #[test]
    fn a_key_is_known_by_its_old_spelling_too() {
        for name in ["orphan-after", "orphan_after"] {
            let config = parse(&format!("{name} = \"2h\"\n")).unwrap();
            assert_eq!(config.orphan_after(), Duration::from_secs(7200), "{name}");
        }
    }

    #[test]
    fn everything_that_a_file_may_say_is_read() {
        let table = parse(ALL).unwrap().table();
        let default = table.iter().find(|(_, _, origin)| origin == "default");
        assert_eq!(default, None);
    }
}
