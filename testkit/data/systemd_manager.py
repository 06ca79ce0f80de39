#!/usr/bin/python3
"""Stands for systemd's manager on a private bus: each process belongs to the unit that is called as its program.

Argument: good; hang (never answers); number (properties that are no strings); huge (properties of a mebibyte).
"""
import sys

import dbus
import dbus.mainloop.glib
import dbus.service
from gi.repository import GLib

MODE = sys.argv[1]
ROOT = "/org/freedesktop/systemd1"


class NoUnit(dbus.DBusException):
    _dbus_error_name = "org.freedesktop.systemd1.NoUnitForPID"


class Unit(dbus.service.Object):
    def __init__(self, bus, path, name):
        super().__init__(bus, path)
        self.name = name

    @dbus.service.method(dbus.PROPERTIES_IFACE, in_signature="ss", out_signature="v")
    def Get(self, interface, name):
        assert interface == "org.freedesktop.systemd1.Unit"
        value = {"Id": self.name, "FragmentPath": "/lib/systemd/system/" + self.name}[name]
        if MODE == "number":
            return dbus.UInt32(7)
        return value * 100_000 if MODE == "huge" else value


class Manager(dbus.service.Object):
    units = {}

    @dbus.service.method(
        "org.freedesktop.systemd1.Manager", in_signature="u", out_signature="o", async_callbacks=("ok", "fail")
    )
    def GetUnitByPID(self, pid, ok, fail):
        if MODE == "hang":
            return
        try:
            program = open(f"/proc/{pid}/comm").read().strip()
        except OSError:
            fail(NoUnit(f"PID {pid} does not belong to any loaded unit."))
            return
        path = ROOT + "/unit/" + "".join(c if c.isalnum() else "_%02x" % ord(c) for c in program) + "_2eservice"
        if path not in self.units:
            self.units[path] = Unit(self.connection, path, program + ".service")
        ok(dbus.ObjectPath(path))


dbus.mainloop.glib.DBusGMainLoop(set_as_default=True)
bus = dbus.SystemBus()
name = dbus.service.BusName("org.freedesktop.systemd1", bus)
manager = Manager(bus, ROOT)
print("ready", flush=True)
GLib.MainLoop().run()
