"""Gymnasium's car with the same floats in half the time."""

from __future__ import annotations

import math
from typing import Any

from gymnasium.envs.box2d.car_dynamics import ENGINE_POWER, FRICTION_LIMIT, SIZE, WHEEL_MOMENT_OF_INERTIA, Car

GRASS_FRICTION = FRICTION_LIMIT * 0.6
STIFFNESS = 205000 * SIZE * SIZE
"""Force of a wheel per unit/s of slip."""
BRAKE_FORCE = 15
"""Radians per second that the brake at 1 takes from a wheel in one frame."""


class FastCar(Car):
    """``Car`` whose numbers are equal to the bit, frame after frame; the tests compare them with the stock car's.

    The stock methods call NumPy on single floats and ask Box2D twice for what it has said. Here are the same operations
    in the same order on Python floats; square roots and products are IEEE 754's in both.
    """

    def gas(self, gas: float) -> None:
        """Throttle of the rear wheels, clipped to 0..1; it opens by 0.1 a frame at most and closes at once."""
        target = min(max(float(gas), 0.0), 1.0)
        for wheel in self.wheels[2:4]:
            wheel.gas += min(target - wheel.gas, 0.1)

    def brake(self, b: float) -> None:
        """Brake of all wheels, 0..1; from 0.9 on they block."""
        for wheel in self.wheels:
            wheel.brake = float(b)

    def steer(self, s: float) -> None:
        """Target angle of the front wheels in radians, -1..1."""
        for wheel in self.wheels[:2]:
            wheel.steer = float(s)

    def step(self, dt: float) -> None:
        """Steer, drive, brake and slip for ``dt`` seconds."""
        for wheel in self.wheels:
            joint = wheel.joint
            joint.motorSpeed = min(max(50.0 * (wheel.steer - joint.angle), -3.0), 3.0)
            self._spin(wheel, dt)
            self._slip(wheel, dt)

    def _spin(self, wheel: Any, dt: float) -> None:
        """Engine and brake change the wheel's angular velocity."""
        omega = wheel.omega
        if wheel.gas:
            power = dt * ENGINE_POWER * wheel.gas
            omega += power / WHEEL_MOMENT_OF_INERTIA / (abs(omega) + 5.0)  # 5.0 lest it divide by zero
            self.fuel_spent += power
        if wheel.brake >= 0.9:
            omega = 0.0
        elif wheel.brake > 0:
            omega -= math.copysign(min(BRAKE_FORCE * wheel.brake, abs(omega)), omega)
        wheel.omega = omega
        wheel.phase += omega * dt

    def _slip(self, wheel: Any, dt: float) -> None:
        """The force of the ground on the wheel, which is proportional to slip until friction gives way."""
        limit = GRASS_FRICTION
        for tile in wheel.tiles:
            limit = max(limit, FRICTION_LIMIT * tile.road_friction)

        forward = wheel.GetWorldVector((0, 1))
        sin, cos = -forward.x, forward.y  # so (1, 0), the wheel's right, is (cos, sin) in the world
        velocity = wheel.linearVelocity
        v_x, v_y = velocity.x, velocity.y
        along = (wheel.omega * wheel.wheel_rad - (cos * v_y - sin * v_x)) * STIFFNESS
        across = -(cos * v_x + sin * v_y) * STIFFNESS
        force = math.sqrt(along * along + across * across)
        self._skid(wheel, force > 2.0 * limit)
        if force > limit:
            along = along / force * limit
            across = across / force * limit
        wheel.omega -= dt * along * wheel.wheel_rad / WHEEL_MOMENT_OF_INERTIA
        wheel.ApplyForceToCenter((across * cos - along * sin, across * sin + along * cos), True)

    def _skid(self, wheel: Any, skidding: bool) -> None:
        """Leave the mark that ``rgb_array`` shows."""
        if not skidding:
            wheel.skid_start = wheel.skid_particle = None
            return
        mark, grass = wheel.skid_particle, not wheel.tiles
        if mark and mark.grass == grass and len(mark.poly) < 30:
            mark.poly.append((wheel.position[0], wheel.position[1]))
        elif wheel.skid_start is None:
            wheel.skid_start = wheel.position
        else:
            start, end = wheel.skid_start, wheel.position
            wheel.skid_particle = self._create_particle(start, end, grass)  # type: ignore[no-untyped-call]
            wheel.skid_start = None
