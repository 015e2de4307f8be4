//! daemon run, start, status, stop.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use serde_json::json;

use super::client::Client;
use super::output::{self, Shown};
use super::place::{Place, SERVICE_SOCKET};
use super::{Context, as_seconds, values};
use crate::daemon::{self, EngineConfig, Options};
use crate::protocol::{Code, Failure, Stop};
use crate::sys::process;

/// How long a drain waits where no time is given: a day.
const DRAIN: &str = "1d";

#[derive(Debug, Subcommand)]
pub enum DaemonCommand {
    /// Serve the store in the foreground
    Run {
        /// Listen here
        #[arg(long)]
        socket: Option<PathBuf>,
        /// Let members of this group use the store
        #[arg(long)]
        group: Option<String>,
        /// Started by another command: announce on standard output, log to the store, end when idle
        #[arg(long, hide = true)]
        embedded: bool,
    },
    /// Start the store's daemon in the background
    Start,
    /// Show whether a daemon serves the store
    Status,
    /// End the store's daemon; refused while forks are live
    Stop {
        /// Take no new forks and wait for the live ones to end
        #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true,
              default_missing_value = DRAIN, value_parser = values::duration, conflicts_with = "force")]
        drain: Option<Duration>,
        /// End the sessions of live forks
        #[arg(long)]
        force: bool,
    },
}

pub fn daemon(context: &Context, command: DaemonCommand) -> Result<(), Failure> {
    match command {
        DaemonCommand::Run {
            socket,
            group,
            embedded,
        } => run(context, socket, group, embedded),
        DaemonCommand::Start => status(context, context.connect()?),
        DaemonCommand::Status => {
            let client = running(context, "forkvol daemon start starts one")?;
            status(context, client)
        }
        DaemonCommand::Stop { drain, force } => {
            running(context, "there is nothing to stop")?.stop(Stop {
                force,
                drain: as_seconds(drain),
            })?;
            output::show(context.json, &json!({"stopped": true}), |_| String::new())
        }
    }
}

/// The daemon that is there; none is started.
fn running(context: &Context, hint: &str) -> Result<Client, Failure> {
    Client::connect(&context.place)?.ok_or_else(|| {
        Failure::new(
            Code::Unreachable,
            format!("no daemon serves {}", context.place),
        )
        .hint(hint)
    })
}

fn status(context: &Context, mut client: Client) -> Result<(), Failure> {
    let status = client.status()?;
    output::show(context.json, &json!(status), |status| {
        output::fields(
            status,
            &[
                ("pid", "/pid", Shown::Plain),
                ("version", "/version", Shown::Plain),
                ("store", "/store", Shown::Plain),
                ("socket", "/socket", Shown::Plain),
                ("uptime", "/uptime", Shown::Seconds),
                ("forks", "/forks", Shown::Plain),
            ],
        )
    })
}

fn run(
    context: &Context,
    socket: Option<PathBuf>,
    group: Option<String>,
    embedded: bool,
) -> Result<(), Failure> {
    let config = &context.config;
    // A socket of the service that is there may be a dead one of this very service.
    let socket = socket
        .or_else(|| context.place.sockets().into_iter().next())
        .ok_or_else(|| {
            Failure::new(Code::Usage, "there is no folder for a socket")
                .hint("name one with --socket")
        })?;
    let is_service = socket == Path::new(SERVICE_SOCKET);
    let store = match &context.place {
        Place::Embedded { store, .. } if !is_service => store.clone(),
        place => place.store_of_service(config),
    };
    let group = group
        .as_deref()
        .or_else(|| config.group().filter(|_| !embedded));
    let group = match group {
        None => None,
        Some(name) => Some(process::group_id(name).ok_or_else(|| {
            Failure::new(Code::Usage, format!("there is no group {name}"))
                .hint(format!("groupadd --system {name}"))
        })?),
    };
    let announce = match embedded {
        false => None,
        true => Some(announce()?),
    };
    let default = EngineConfig::default();
    daemon::run(Options {
        store,
        socket,
        group,
        keep_name: is_service,
        idle: embedded.then(|| config.idle()),
        embedded,
        engine: EngineConfig {
            cache: config.cache(),
            reserve: config.reserve(),
            threads: config.threads().unwrap_or(default.threads),
            orphan_after: config.orphan_after(),
            wakeful: config.wakeful(),
            retention: config.retention().clone(),
            trust: config.trust().cloned(),
            ..default
        },
        announce,
    })
}

/// Leaves the caller's session; returns what the caller listens on.
fn announce() -> Result<std::fs::File, Failure> {
    let failed = |what: &str, e: std::io::Error| Failure::new(Code::Failed, format!("{what}: {e}"));
    // A leader of a process group cannot leave it, and need not: it is nobody's job.
    process::new_session().ok();
    process::take_stdout().map_err(|e| failed("cannot take standard output over", e))
}
